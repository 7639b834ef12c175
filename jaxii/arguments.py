"""The flags, and what of them each command takes.

Read by `main`, which parses the command line; comes before everything that works.
"""

import re
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxii import clusters
from jaxii import config as configuration
from jaxii.errors import InputError
from jaxii.files import AnyPath, at
from jaxii.usage import DECODERS

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe and preset.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The prepared dataset.")
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Label files and pictures.")
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
_IMAGES = flags.DEFINE_string("images", "", "Folder of pictures.")
_IDS = flags.DEFINE_string("ids", "", "Sample submission.")
_OUTPUT = flags.DEFINE_string("output", "", "File to write.")
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
_REUSE_BATCH = flags.DEFINE_bool("reuse_batch", False, "One batch all the time.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "In all.", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "From 0.", lower_bound=-1)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_seconds", 60, "Seconds.", lower_bound=1
)
# The commands that several processes can run as one.
TOGETHER = ("train", "evaluate", "hold_out", "adapt", "predict")


def arguments_of(command: str, rest: list[str]) -> dict[str, Any]:
    """Returns a command's arguments by name.

    Args:
      command: one of `usage.COMMANDS`.
      rest: the words that are no flags.

    Raises:
      InputError: a flag that is missing or cannot be used.
    """
    if command == "compare":
        return _of_compare(rest)
    return _OF_COMMAND[command]()


def place_of(command: str) -> clusters.Place | None:
    """Returns which process of several this one is; None where it is the only one.

    Raises:
      InputError: flags that do not fit together, or a command that runs alone.
    """
    place = clusters.from_flags(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    if command in TOGETHER:
        return place or clusters.detected()
    if place is not None:
        raise InputError(
            f"{command} runs in one process; --coordinator, --num_processes and "
            f"--process_id are for {', '.join(TOGETHER)}."
        )
    return None


def start_timeout() -> int:
    """Returns how many seconds the processes of a run wait for one another."""
    return _START_TIMEOUT.value


def config_of() -> configuration.Config:
    """Returns the configuration that was given.

    Raises:
      InputError: none was, or it cannot work.
    """
    if CONFIG.value is None:
        raise InputError(
            "--config is missing; for a first run give "
            "--config configs/f2_multitask.py."
        )
    config = CONFIG.value
    if _DATA_DIR.value:
        config.data.directory = _DATA_DIR.value
    try:
        configuration.check(config)
    except ValueError as error:
        raise InputError(str(error)) from error
    return config


def _of_train() -> dict[str, Any]:
    recipe = _recipe()
    config = config_of()
    config.data.reuse_batch |= _REUSE_BATCH.value
    return {
        "config": config,
        "workdir": _new_workdir(config),
        "allow_tuning_labels": _ALLOW_TUNING.value,
        "change_batch_size": _CHANGE_BATCH_SIZE.value,
        "profile_steps": _profile_steps(_PROFILE_STEPS.value),
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


def _profile_steps(text: str) -> tuple[int, int]:
    """Returns the steps after which a trace starts and ends; equal ones for none."""
    if not text:
        return 0, 0
    # No sign, and none of the other digits of Unicode.
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    raise InputError(
        f"--profile_steps={text} is not FIRST:LAST with FIRST below LAST; 100:105 "
        "traces the five updates after step 100."
    )


def _of_prepare() -> dict[str, Any]:
    directory = _required("input_dir", _INPUT_DIR.value)
    output = _required("data_dir", _DATA_DIR.value)
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
    }


def _of_hold_out() -> dict[str, Any]:
    return {
        "workdir": _required("workdir", _WORKDIR.value),
        "config": config_of() if CONFIG.value is not None else None,
        "data_dir": _DATA_DIR.value,
    }


def _of_adapt() -> dict[str, Any]:
    if not _ALLOW_TUNING.value:
        raise InputError(
            "adapt lets labels of the target domain train the weights; add "
            "--allow_tuning_labels if that is meant."
        )
    return _trained() | {
        "output": _required("output", _OUTPUT.value),
        "trainable": _TRAIN.value,
        "num_epochs": _NUM_EPOCHS.value,
        "peak_lr": _PEAK_LR.value,
        "data_dir": _DATA_DIR.value,
    }


def _of_predict() -> dict[str, Any]:
    trained = _trained()
    return trained | {
        "images": _required("images", _IMAGES.value),
        "ids": at(_IDS.value) if _IDS.value else None,
        "output": _output("CSV") or trained["workdir"] / "predictions.csv",
        "decoder": _DECODER.value or "",
        "variant": _variant(),
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


def _trained() -> dict[str, Any]:
    return {"workdir": _required("workdir", _WORKDIR.value), "stage": _STAGE.value}


def _variant() -> dict[str, Any]:
    return {
        "ensemble": tuple(_ENSEMBLE.value),
        "adapt_bn": _ADAPT_BN.value,
        "label_shift": _LABEL_SHIFT.value,
        "allow_tuning_labels": _ALLOW_TUNING.value,
    }


def _output(kind: str) -> AnyPath | None:
    output = at(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None and output.is_dir():
        raise InputError(
            f"--output={output} is a folder; give the name of a file for the {kind}."
        )
    return output


def _new_workdir(config: configuration.Config) -> AnyPath:
    if _WORKDIR.value:
        return at(_WORKDIR.value)
    recipe, _, preset = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    return Path("runs") / f"{Path(recipe).stem}-{preset or config.data.dataset}"


def _required(name: str, value: str) -> AnyPath:
    if not value:
        raise InputError(f"--{name} is missing; see --help of the command.")
    return at(value)


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
    "predict": _of_predict,
    "plan": _of_plan,
}
