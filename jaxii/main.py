"""The command line: help, parsing, dispatch and exit codes; nothing else.

`python -m jaxii.main [COMMAND] --config=configs/f2_multitask.py`; see `COMMANDS`.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from logging import LogRecord
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from jaxii.arguments import CONFIG, arguments_of
from jaxii.config import check_overrides
from jaxii.distributed.cluster import Place
from jaxii.errors import CheckFailed, InputError, nearest, nearest_path
from jaxii.place_flags import place_of, start_timeout
from jaxii.storage import user_cache
from jaxii.usage import COMMANDS, help_text

DONE, FAILED, MISUSED, PREEMPTED = 0, 1, 2, 75
# JAX's own variable; empty, nothing is kept.
CACHE = "JAX_COMPILATION_CACHE_DIR"


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
                f"{command!r} is not a command; {nearest(command, COMMANDS)}use one of "
                f"{', '.join(COMMANDS)}."
            )
        return _dispatch(command, rest, argv)
    except InputError as error:
        print(f"jaxii: {' '.join(str(error).split())}", file=sys.stderr)
        return MISUSED


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, which loads the recipe; returns the words that are no flags."""
    recipe = _recipe(argv)
    if recipe is not None and not Path(recipe.partition(":")[0]).is_file():
        near = nearest_path(Path(recipe.partition(":")[0]))
        raise InputError(
            f"--config={recipe} is not a file; "
            + (near or "give a recipe such as configs/f2_multitask.py.")
        )
    check_overrides(argv)
    try:
        rest = flags.FLAGS(argv)[1:]
    except (flags.UnrecognizedFlagError, flags.IllegalFlagValueError) as error:
        raise _flag_error(recipe, error) from error
    except flags.Error as error:
        raise InputError(f"{error}; see --help.") from error
    except Exception as error:
        # A recipe is a program of the user's: whatever it raises is theirs to mend.
        raise _recipe_error(recipe, error) from error
    if recipe is not None and not isinstance(CONFIG.value, ConfigDict):
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
    known = name in flags.FLAGS
    if name.startswith("config.") and known:
        default = flags.FLAGS[name].default
        if default is not None:
            text += f"; give a value like the default, {default!r}"
    choices = getattr(flags.FLAGS[name].parser, "enum_values", ()) if known else ()
    near = nearest(text.partition("=")[2].partition(":")[0], choices)
    return InputError(f"{text.removeprefix('flag ')}; {near}see --help.")


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


def _dispatch(command: str, rest: list[str], argv: list[str]) -> int:
    given = arguments_of(command, rest)
    place = place_of(command)
    _keep_compiled_programs()
    # Here and not above: importing jax takes seconds, and neither help nor a message
    # about the command line should.
    from jaxii.cli import compare, prepare
    from jaxii.prepare import new
    from jaxii.runs import (
        adapt,
        doctor,
        evaluate,
        export,
        hold_out,
        plan,
        predict,
        train,
    )
    from jaxii.runs.scoring import Variant
    from jaxii.runs.workdir import Workdir

    if "workdir" in given:
        given["workdir"] = Workdir(given["workdir"])
    if "variant" in given:
        given["variant"] = Variant(**given["variant"])
    if "request" in given:
        given["request"] = predict.Request(**given["request"])
    if command == "new":
        import jax

        given["platform"] = jax.default_backend()
        given["num_devices"] = jax.device_count()
    act = {
        "train": train.train,
        "new": new.new,
        "prepare": prepare.prepare,
        "evaluate": evaluate.evaluate,
        "hold_out": hold_out.hold_out,
        "adapt": adapt.adapt,
        "predict": predict.predict,
        "export": export.export,
        "plan": plan.plan,
        "compare": compare.compare,
        "doctor": doctor.doctor,
    }[command]
    return _run(partial(act, **given), command, place, argv)


def _run(
    act: Callable[..., object], command: str, place: Place | None, argv: list[str]
) -> int:
    """Runs a command and says how it ended; several processes meet before and part."""
    from jaxii.distributed import processes
    from jaxii.train.failed_save import FailedSave
    from jaxii.train.trainer import Diverged, Preempted

    code, text = DONE, ""
    try:
        if place is not None:
            processes.join(place, argv, start_timeout())
        if command in ("train", "hold_out", "adapt"):
            act = partial(act, wanted_back=processes.wanted_back())
        act()
    except InputError as error:
        code, text = MISUSED, " ".join(str(error).split())
    except Preempted as stopped:
        code, text = PREEMPTED, f"{stopped}; the same command goes on."
    except (Diverged, FailedSave, CheckFailed, processes.Lost) as error:
        code, text = FAILED, str(error)
    except Exception as error:
        if place is None:
            raise
        traceback.print_exc()
        code, text = FAILED, processes.failure(place, error)
    if text and (code == FAILED or place is None or place.index == 0):
        print(f"jaxii: {text}", file=sys.stderr)
    if place is not None:
        processes.leave(code)
    return code


def _set_environment() -> None:
    """Sets what libraries read at import: quiet logs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.get_absl_logger().addFilter(_is_not_of_orbax)


def _keep_compiled_programs() -> None:
    """Lets JAX keep them in the user's cache for the next start, unless told where.

    Goes without where the folder cannot be written, as in a home that is read-only:
    JAX would warn of every program.
    """
    if CACHE in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = user_cache() / "compiled"
        # What is in it runs: nobody else may write there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[CACHE] = str(folder)


def _is_not_of_orbax(record: LogRecord) -> bool:
    # A failed save is a dozen tracebacks of its threads, and one line of jaxii's.
    return "orbax" not in record.pathname


if __name__ == "__main__":
    run()
