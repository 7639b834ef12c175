"""The command line: flags, help, dispatch and exit codes; nothing else.

`python -m jaxii.main [COMMAND] --config=configs/f2_multitask.py`; see `COMMANDS`.
"""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from jaxii import config as configuration
from jaxii.errors import InputError
from jaxii.usage import COMMANDS, DECODERS, help_text

DONE, FAILED, MISUSED, PREEMPTED = 0, 1, 2, 75

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe and preset.")
_WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The prepared dataset.")
_INPUT_DIR = flags.DEFINE_string("input_dir", "", "Label files and pictures.")
_SHORT_SIDE = flags.DEFINE_integer("short_side", 256, "Pixels.", lower_bound=16)
_TRAIN_METADATA = flags.DEFINE_string("train_metadata", "", "CSV.")
_TEST_LABELS = flags.DEFINE_string("test_labels", "", "CSV.")
_TEST_METADATA = flags.DEFINE_string("test_metadata", "", "CSV.")
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
_DECODER = flags.DEFINE_enum("decoder", None, DECODERS, "Decoder.")


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code.

    Args:
      argv: `sys.argv` itself: overrides of the configuration are looked up there.
    """
    if any(word in ("-h", "--help", "-help") for word in argv[1:]):
        print(help_text(argv[1:]))
        return DONE
    _set_environment()
    try:
        rest = _parse(argv)
        command = rest.pop(0) if rest else "train"
        if command not in COMMANDS:
            raise InputError(
                f"{command!r} is not a command; use one of {', '.join(COMMANDS)}."
            )
        if rest and command != "compare":
            raise InputError(
                f"{command} takes flags only, not {rest[0]!r}; see {command} --help."
            )
        return _dispatch(command, rest)
    except InputError as error:
        print(f"jaxii: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSED


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, which loads the recipe; returns the words that are no flags."""
    recipe = _recipe(argv)
    if recipe is not None and not Path(recipe.partition(":")[0]).is_file():
        raise InputError(
            f"--config={recipe} is not a file; give a recipe such as "
            "configs/f2_multitask.py."
        )
    try:
        configuration.check_overrides(argv)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        rest = flags.FLAGS(argv)[1:]
    except (flags.UnrecognizedFlagError, flags.IllegalFlagValueError) as error:
        raise _flag_error(recipe, error) from error
    except flags.Error as error:
        raise InputError(f"{error}; see --help.") from error
    except Exception as error:
        # A recipe is a program of the user's: whatever it raises is theirs to mend.
        raise _recipe_error(recipe, error) from error
    if recipe is not None and not isinstance(_CONFIG.value, ConfigDict):
        raise InputError(
            f"--config={recipe}: get_config() does not return a configuration; change "
            "and return what jaxii.config.default_config() gives."
        )
    return rest


def _recipe(argv: list[str]) -> str | None:
    """Returns what --config was given, before the flags are parsed."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            return value if equals else " ".join(argv[i + 1 : i + 2])
    return None


def _flag_error(recipe: str | None, error: Exception) -> InputError:
    text = str(error).partition("\n")[0]
    if text.startswith(f"flag --config={recipe}:"):
        return _recipe_error(recipe, error)
    name = text.removeprefix("flag --").partition("=")[0]
    if name.startswith("config.") and name in flags.FLAGS:
        default = flags.FLAGS[name].default
        if default is not None:
            text += f"; give a value like the default, {default!r}"
    return InputError(f"{text.removeprefix('flag ')}; see --help.")


def _recipe_error(recipe: str | None, error: BaseException) -> InputError:
    """Returns a recipe's own error and the line it came from."""
    frames = list(traceback.extract_tb(error.__traceback__))
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
        frames += traceback.extract_tb(error.__traceback__)
    file = str(recipe).partition(":")[0]
    lines = [f"line {frame.lineno}" for frame in frames if frame.filename == file]
    where = f" ({lines[-1]})" if lines else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    # A recipe's own message may name it already.
    text = text.removeprefix(f"{recipe}; ")
    return InputError(f"--config={recipe}: {kind}{text}{where}")


def _dispatch(command: str, rest: list[str]) -> int:
    given = _arguments(command, rest)
    # Here and not above: importing jax takes seconds, and neither help nor a message
    # about the command line should.
    from jaxii.commands import (
        adapt,
        compare,
        evaluate,
        hold_out,
        predict,
        prepare,
        train,
    )
    from jaxii.scoring import Variant
    from jaxii.train.loop import Diverged, Preempted
    from jaxii.workdir import Workdir

    if "workdir" in given:
        given["workdir"] = Workdir(given["workdir"])
    if "variant" in given:
        given["variant"] = Variant(**given["variant"])
    if command in ("train", "hold_out", "adapt"):
        given["wanted_back"] = _wanted_back()
    act = {
        "train": train.train,
        "prepare": prepare.prepare,
        "evaluate": evaluate.evaluate,
        "hold_out": hold_out.hold_out,
        "adapt": adapt.adapt,
        "predict": predict.predict,
        "compare": compare.compare,
    }[command]
    try:
        act(**given)
    except Preempted as stopped:
        print(f"jaxii: {stopped}; the same command goes on.", file=sys.stderr)
        return PREEMPTED
    except Diverged as error:
        print(f"jaxii: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _arguments(command: str, rest: list[str]) -> dict[str, Any]:
    """Returns a command's arguments by name; refuses what is missing."""
    if command == "train":
        config = _config()
        return {
            "config": config,
            "workdir": _new_workdir(config),
            "allow_tuning_labels": _ALLOW_TUNING.value,
        }
    if command == "prepare":
        directory = _required("input_dir", _INPUT_DIR.value)
        output = _required("data_dir", _DATA_DIR.value)
        if output.exists() and not output.is_dir():
            raise InputError(f"--data_dir={output} is a file; give a new folder.")
        return {
            "directory": directory,
            "output": output,
            "short_side": _SHORT_SIDE.value,
            "overrides": _layout_files(),
        }
    if command == "evaluate":
        if _TUNE_ON.value == "tuning" and not _ALLOW_TUNING.value:
            raise InputError(
                "--tune_on=tuning lets labels of the target domain choose the "
                "threshold; add --allow_tuning_labels if that is meant."
            )
        return _trained() | {
            "data_dir": _DATA_DIR.value,
            "tune_on": _TUNE_ON.value,
            "decoder": _DECODER.value or "threshold",
            "variant": _variant(),
        }
    if command == "hold_out":
        return {
            "workdir": _required("workdir", _WORKDIR.value),
            "config": _config() if _CONFIG.value is not None else None,
            "data_dir": _DATA_DIR.value,
        }
    if command == "adapt":
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
    if command == "predict":
        return _prediction(**_trained())
    return {
        "paths": [Path(word) for word in rest],
        "output": _output("HTML"),
        "each": _EACH.value,
        "markdown": _MARKDOWN.value,
    }


def _trained() -> dict[str, Any]:
    return {"workdir": _required("workdir", _WORKDIR.value), "stage": _STAGE.value}


def _prediction(workdir: Path, stage: str) -> dict[str, Any]:
    return {
        "workdir": workdir,
        "stage": stage,
        "images": _required("images", _IMAGES.value),
        "ids": Path(_IDS.value) if _IDS.value else None,
        "output": _output("CSV") or workdir / "predictions.csv",
        "decoder": _DECODER.value or "",
        "variant": _variant(),
    }


def _variant() -> dict[str, Any]:
    return {
        "ensemble": tuple(_ENSEMBLE.value),
        "adapt_bn": _ADAPT_BN.value,
        "label_shift": _LABEL_SHIFT.value,
        "allow_tuning_labels": _ALLOW_TUNING.value,
    }


def _output(kind: str) -> Path | None:
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None and output.is_dir():
        raise InputError(
            f"--output={output} is a folder; give the name of a file for the {kind}."
        )
    return output


def _config() -> configuration.Config:
    if _CONFIG.value is None:
        raise InputError(
            "--config is missing; for a first run give "
            "--config configs/f2_multitask.py."
        )
    config = _CONFIG.value
    if _DATA_DIR.value:
        config.data.directory = _DATA_DIR.value
    try:
        configuration.check(config)
    except ValueError as error:
        raise InputError(str(error)) from error
    return config


def _new_workdir(config: configuration.Config) -> Path:
    if _WORKDIR.value:
        return Path(_WORKDIR.value)
    recipe, _, preset = config_flags.get_config_filename(
        flags.FLAGS["config"]
    ).partition(":")
    return Path("runs") / f"{Path(recipe).stem}-{preset or config.data.dataset}"


def _required(name: str, value: str) -> Path:
    if not value:
        raise InputError(f"--{name} is missing; see --help of the command.")
    return Path(value)


def _layout_files() -> dict[str, Path]:
    given = {
        "train_metadata": _TRAIN_METADATA.value,
        "test_labels": _TEST_LABELS.value,
        "test_metadata": _TEST_METADATA.value,
    }
    return {name: Path(value) for name, value in given.items() if value}


def _wanted_back():
    """Turns the first SIGTERM or Ctrl-C into a request to save and leave."""
    asked = []

    def ask(signum, frame):
        if asked:
            signal.default_int_handler(signum, frame)
        asked.append(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return lambda: bool(asked)


def _set_environment() -> None:
    """Sets what libraries read at import: the compilation cache, quiet logs."""
    cache = Path.home() / ".cache" / "jaxii" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl_logging.set_verbosity(absl_logging.ERROR)


if __name__ == "__main__":
    run()
