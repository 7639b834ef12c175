"""The flags, and what of them each command takes.

Read by `main`, which parses the command line; comes before everything that works.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxii.config import Config
from jaxii.errors import InputError
from jaxii.given import existing, file_to_write, local, profile_steps, required
from jaxii.storage import AnyPath, at
from jaxii.usage import DECODERS, LABEL_SEPARATORS

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe and preset.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The prepared dataset.")
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Label files and images.")
_SHORT_SIDE = flags.DEFINE_integer("short_side", 256, "Pixels.", lower_bound=16)
_TRAIN_METADATA = flags.DEFINE_string("train_metadata", "", "CSV.")
_TEST_LABELS = flags.DEFINE_string("test_labels", "", "CSV.")
_TEST_METADATA = flags.DEFINE_string("test_metadata", "", "CSV.")
_BEAM_RUNNER = flags.DEFINE_string("beam_runner", "", "Apache Beam's runner.")
_BEAM_OPTIONS = flags.DEFINE_list("beam_options", [], "Options of the pipeline.")
_STAGE = flags.DEFINE_string("stage", "", "Name of a stage.")
_TUNE_ON = flags.DEFINE_enum(
    "tune_on", "", ["", "validation", "held_out", "tuning"], "Split."
)
_ALLOW_TUNING = flags.DEFINE_bool("allow_tuning_labels", False, "Say yes to tuning.")
_TRAIN = flags.DEFINE_enum("train", "all", ["all", "last_layer"], "What learns.")
_NUM_EPOCHS = flags.DEFINE_float("num_epochs", 0.0, "Passes.", lower_bound=0.0)
_PEAK_LR = flags.DEFINE_float("peak_lr", 0.0, "Learning rate.", lower_bound=0.0)
_ENSEMBLE = flags.DEFINE_list("ensemble", [], "Other runs.")
_ADAPT_BN = flags.DEFINE_bool("adapt_bn", False, "BatchNorm of the target.")
_LABEL_SHIFT = flags.DEFINE_bool("label_shift", False, "Frequencies of the target.")
_IMAGES = flags.DEFINE_string("images", "", "Folder, CSV or images.")
_LABELS = flags.DEFINE_string("labels", "", "Label file.")
_PATH_COLUMN = flags.DEFINE_string("path_column", "", "Names the images.")
_LABEL_COLUMN = flags.DEFINE_string("label_column", "", "Has the labels.")
_LABEL_SEPARATOR = flags.DEFINE_enum(
    "label_separator", "", ["", *LABEL_SEPARATORS], "Between labels in a cell."
)
_FOLD_CASE = flags.DEFINE_bool("fold_case", False, "Dog and dog are one label.")
_MIN_IMAGES = flags.DEFINE_integer("min_images", 1, "A label.", lower_bound=1)
_IDS = flags.DEFINE_string("ids", "", "Sample submission.")
_OUTPUT = flags.DEFINE_string("output", "", "File to write.")
_ONNX = flags.DEFINE_bool("onnx", False, "An ONNX model too.")
_SHEET = flags.DEFINE_string("sheet", "", "Contact sheet to write.")
_EACH = flags.DEFINE_bool("each", False, "Every run is a row.")
_MARKDOWN = flags.DEFINE_bool("markdown", False, "A table for a README.")
_TOPOLOGY = flags.DEFINE_list("topology", ["local"], "TPU slices.")
_DEVICE_BATCH_SIZE = flags.DEFINE_integer(
    "device_batch_size", 0, "Images a device.", lower_bound=0
)
_QUICK = flags.DEFINE_bool("quick", False, "One compile.")
_DECODER = flags.DEFINE_enum("decoder", None, DECODERS, "Decoder.")
_CHANGE_BATCH_SIZE = flags.DEFINE_bool("change_batch_size", False, "Go on with it.")
_PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST.")
_VERIFY = flags.DEFINE_bool("verify", False, "Hash every byte of the data.")
_REUSE_BATCH = flags.DEFINE_bool("reuse_batch", False, "One batch all the time.")
# What the file of `predict` can be, by its ending.
ANSWERS = (".csv", ".jsonl")


def arguments_of(command: str, rest: list[str]) -> dict[str, Any]:
    """Returns a command's arguments by name.

    Args:
      command: one of `usage.COMMANDS`.
      rest: the words that are no flags.

    Raises:
      InputError: a flag that is missing or cannot be used.
    """
    if command in _OF_WORDS:
        return _OF_WORDS[command](rest)
    if rest:
        raise InputError(
            f"{command} takes flags only, not {rest[0]!r}; see {command} --help."
        )
    return _OF_COMMAND[command]()


def config_of() -> Config:
    """Returns the configuration that was given.

    Raises:
      InputError: none was, or it cannot work.
    """
    if CONFIG.value is None:
        raise InputError(
            "--config is missing; for a first run give "
            "--config configs/f2_multitask.py."
        )
    return Config.resolve(CONFIG.value).moved(_DATA_DIR.value)


def _of_train() -> dict[str, Any]:
    recipe = _recipe()
    config = config_of()
    if _REUSE_BATCH.value:
        config = replace(config, data=replace(config.data, reuse_batch=True))
    return {
        "config": config,
        "workdir": _new_workdir(config),
        "allow_tuning_labels": _ALLOW_TUNING.value,
        "change_batch_size": _CHANGE_BATCH_SIZE.value,
        "profile_steps": profile_steps(_PROFILE_STEPS.value),
        "verify": _VERIFY.value,
        "recipe": recipe,
    }


def _recipe() -> dict[str, Any]:
    """Returns the recipe's name, and its own values of what flags change."""
    if CONFIG.value is None:
        return {}
    holder = flags.FLAGS["config"]
    own = {
        name: flags.FLAGS[f"config.{name}"].default
        for name in config_flags.get_override_values(holder)
    }
    if _DATA_DIR.value:
        own.setdefault("data.directory", CONFIG.value.data.directory)
    if _REUSE_BATCH.value:
        own.setdefault("data.reuse_batch", CONFIG.value.data.reuse_batch)
    return {"name": config_flags.get_config_filename(holder), "own": own}


def _of_prepare() -> dict[str, Any]:
    directory = existing("input_dir", _INPUT_DIR.value)
    output = required("data_dir", _DATA_DIR.value)
    if _BEAM_OPTIONS.value and not _BEAM_RUNNER.value:
        raise InputError("--beam_options without --beam_runner; give both or neither.")
    if output.exists() and not output.is_dir():
        raise InputError(f"--data_dir={output} is a file; give a new folder.")
    return {
        "directory": directory,
        "output": output,
        "short_side": _SHORT_SIDE.value,
        "overrides": _layout_files(),
        "beam_runner": _BEAM_RUNNER.value,
        "beam_options": tuple(_BEAM_OPTIONS.value),
    }


def _of_evaluate() -> dict[str, Any]:
    if _TUNE_ON.value == "tuning" and not _ALLOW_TUNING.value:
        raise InputError(
            "--tune_on=tuning lets labels of the target domain choose the threshold; "
            "add --allow_tuning_labels if that is meant."
        )
    return _trained() | {
        "data_dir": _DATA_DIR.value,
        "tune_on": _TUNE_ON.value,
        "decoder": _DECODER.value or "threshold",
        "variant": _variant(),
        "verify": _VERIFY.value,
    }


def _of_hold_out() -> dict[str, Any]:
    return {
        "workdir": required("workdir", _WORKDIR.value),
        "config": config_of() if CONFIG.value is not None else None,
        "data_dir": _DATA_DIR.value,
        "verify": _VERIFY.value,
    }


def _of_adapt() -> dict[str, Any]:
    if not _ALLOW_TUNING.value:
        raise InputError(
            "adapt lets labels of the target domain train the weights; add "
            "--allow_tuning_labels if that is meant."
        )
    return _trained() | {
        "output": required("output", _OUTPUT.value),
        "trainable": _TRAIN.value,
        "num_epochs": _NUM_EPOCHS.value,
        "peak_lr": _PEAK_LR.value,
        "data_dir": _DATA_DIR.value,
        "verify": _VERIFY.value,
    }


def _of_predict(words: list[str]) -> dict[str, Any]:
    trained = _trained()
    if not _IMAGES.value:
        raise InputError("--images is missing; see --help of the command.")
    output, sheet = (
        _output("CSV or JSON lines"),
        file_to_write("sheet", _SHEET.value, "HTML"),
    )
    if output is None and sheet is None:
        output = trained["workdir"] / "predictions.csv"
    if output is not None and output.suffix not in ANSWERS:
        raise InputError(
            f"--output={output} ends in neither of {', '.join(ANSWERS)}; its ending "
            "says what is written: a submission, or JSON lines with scores."
        )
    if output is not None and output == sheet:
        raise InputError(f"--output and --sheet are both {sheet}; name two files.")
    request = {
        "images": _IMAGES.value,
        "more": tuple(words),
        "ids": at(_IDS.value) if _IDS.value else None,
        "output": output,
        "sheet": sheet,
    }
    return trained | {
        "request": request,
        "decoder": _DECODER.value or "",
        "variant": _variant(),
    }


def _of_export() -> dict[str, Any]:
    return _trained() | {
        "output": required("output", _OUTPUT.value),
        "decoder": _DECODER.value or "",
        "onnx": _ONNX.value,
        "data_dir": _DATA_DIR.value,
        "verify": _VERIFY.value,
    }


def _of_plan() -> dict[str, Any]:
    return {
        "config": config_of(),
        "topology": tuple(_TOPOLOGY.value) or ("local",),
        "device_batch_size": _DEVICE_BATCH_SIZE.value,
        "stage": _STAGE.value,
        "quick": _QUICK.value,
    }


def _of_compare(words: list[str]) -> dict[str, Any]:
    return {
        "paths": [at(word) for word in words],
        "output": _output("HTML"),
        "each": _EACH.value,
        "markdown": _MARKDOWN.value,
    }


def _of_new(words: list[str]) -> dict[str, Any]:
    if len(words) != 1 or not re.fullmatch(r"[\w-]+", Path(words[0]).name):
        raise InputError(
            f"new needs one name, of letters, digits, _ and -, not "
            f"{' '.join(words) or 'none'}; it is the folder that is made: new mydata "
            "--images=DIR --labels=CSV."
        )
    return {
        "folder": local("NAME", at(words[0])),
        "images": local("--images", existing("images", _IMAGES.value)),
        "labels": (
            local("--labels", existing("labels", _LABELS.value))
            if _LABELS.value
            else None
        ),
        "path_column": _PATH_COLUMN.value,
        "label_column": _LABEL_COLUMN.value,
        "label_separator": _LABEL_SEPARATOR.value,
        "fold_case": _FOLD_CASE.value,
        "min_images": _MIN_IMAGES.value,
    }


def _of_doctor() -> dict[str, Any]:
    config = None
    if CONFIG.value is not None:
        config = config_of()
    elif _DATA_DIR.value:
        raise InputError(
            "--data_dir needs the recipe that is to train on it; add --config."
        )
    return {"config": config, "place": at(_WORKDIR.value or "runs")}


def _trained() -> dict[str, Any]:
    return {"workdir": existing("workdir", _WORKDIR.value), "stage": _STAGE.value}


def _variant() -> dict[str, Any]:
    return {
        "ensemble": tuple(_ENSEMBLE.value),
        "adapt_bn": _ADAPT_BN.value,
        "label_shift": _LABEL_SHIFT.value,
        "allow_tuning_labels": _ALLOW_TUNING.value,
    }


def _output(kind: str) -> AnyPath | None:
    return file_to_write("output", _OUTPUT.value, kind)


def _new_workdir(config: Config) -> AnyPath:
    if _WORKDIR.value:
        return at(_WORKDIR.value)
    recipe, _, preset = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    return Path("runs") / f"{Path(recipe).stem}-{preset or config.data.dataset}"


def _layout_files() -> dict[str, AnyPath]:
    given = {
        "train_metadata": _TRAIN_METADATA.value,
        "test_labels": _TEST_LABELS.value,
        "test_metadata": _TEST_METADATA.value,
    }
    return {name: at(value) for name, value in given.items() if value}


_OF_COMMAND = {
    "train": _of_train,
    "prepare": _of_prepare,
    "evaluate": _of_evaluate,
    "hold_out": _of_hold_out,
    "adapt": _of_adapt,
    "export": _of_export,
    "plan": _of_plan,
    "doctor": _of_doctor,
}
# Those that take words beside flags.
_OF_WORDS = {"compare": _of_compare, "new": _of_new, "predict": _of_predict}
