"""Finds the command, parses its flags, runs it, and returns the exit code.

Imports no JAX, so that help and errors of the command line are immediate; a command
imports what it needs in its `run`.
"""

import difflib
import errno
import io
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from absl import flags as absl_flags
from absl import logging as absl_logging

from jaxii.cli import (
    adapt,
    compare,
    doctor,
    evaluate,
    export,
    hold_out,
    new,
    plan,
    predict,
    prepare,
    suspects,
    train,
)
from jaxii.cli.flags import Flags
from jaxii.config import check_returned, field_names
from jaxii.console import open_ended, write_line
from jaxii.distributed.cluster import ProcessInfo
from jaxii.errors import CheckFailed, InputError, nearest, nearest_path, recipe_error

DONE, FAILED, MISUSED, PREEMPTED = 0, 1, 2, 75
# Width of help texts, and the column at which descriptions begin.
WIDTH, COLUMN = 88, 25


# errno -> fix; other errors of the operating system are bugs.
FIXES = {
    errno.ENOSPC: "free up disk space",
    errno.EDQUOT: "free up disk space",
    errno.EFBIG: "raise the limit on the file size (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "raise the memory limit or close other programs",
    errno.EROFS: "use a writable path",
    errno.EACCES: "change its permissions or use another path",
    errno.EPERM: "change its permissions or use another path",
    errno.ENOTDIR: "use a path whose parents are all folders",
    errno.EISDIR: "use the path of a file",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the disk",
}
# Text of errors of Python and Matplotlib, which write small temporary files.
NO_TEMPORARY = "temporary directory"
# Texts of errors of XLA, OpenCV, Python's threads and the dynamic loader.
NO_MEMORY = (
    "RESOURCE_EXHAUSTED",
    "Insufficient memory",
    "can't start new thread",
    "failed to map segment",
)
MORE_MEMORY = (
    "raise the memory limit (of the device, the container, the job, ulimit -v), close "
    "other programs, or, in training, use a smaller global_batch_size or more "
    "micro_batches. Then run the same command again."
)


class Command(Protocol):
    """A module of this package that is a command."""

    @property
    def HELP(self) -> str:
        """The help text: summary, examples, `{flags}` for the list of flags, notes."""
        ...

    def declare(self, flags: Flags) -> None:
        """Declares the flags that the command reads."""
        ...

    def run(self, flags: Flags) -> None:
        """Checks the flags, then imports what the command needs and runs it."""
        ...


DEFAULT = "train"
COMMANDS: Mapping[str, Command] = {
    "train": train,
    "new": new,
    "prepare": prepare,
    "evaluate": evaluate,
    "hold_out": hold_out,
    "suspects": suspects,
    "adapt": adapt,
    "predict": predict,
    "export": export,
    "plan": plan,
    "doctor": doctor,
    "compare": compare,
}


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code.

    Args:
      argv: As `sys.argv`: the program, then the words of the command line.
    """
    _set_outputs()
    _set_environment()
    flags = None
    code, text = DONE, ""
    try:
        if any(word in ("-h", "--help", "-help") for word in argv[1:]):
            with open_ended(sys.stdout):
                print(help_text(argv[1:]), flush=True)
            return DONE
        command, rest = find_command(argv[1:])
        flags = parse(command, [argv[0], *rest])
        COMMANDS[command].run(flags)
    except InputError as error:
        code, text = MISUSED, str(error)
    except Exception as error:
        code, text = _failure(error, flags.place if flags is not None else None)
    place = flags.place if flags is not None else None
    if text:
        who = ""
        # Other messages name the process themselves.
        if code == MISUSED and place is not None and place.index > 0:
            who = f"process {place.index} of {place.count}: "
        write_line(f"jaxii: {who}{' '.join(text.split())}", sys.stderr)
    if place is not None:
        from jaxii.distributed import processes

        processes.leave(code)
    return code


def _failure(error: Exception, place: ProcessInfo | None) -> tuple[int, str]:
    """Returns an error's exit code and message; re-raises bugs of a single process."""
    # Checked first: without memory, the imports below would fail.
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        reason = str(error).partition("\n")[0][:200] or "MemoryError"
        return FAILED, f"out of memory ({reason}); {MORE_MEMORY}"
    if isinstance(error, OSError) and error.errno in FIXES:
        where = f"{error.filename}: " if error.filename else ""
        fix = FIXES[error.errno]
        return FAILED, f"{where}{error.strerror}; {fix}, then run the command again."
    if isinstance(error, OSError) and NO_TEMPORARY in str(error):
        return FAILED, (
            f"no folder for temporary files ({error.strerror or error}); set TMPDIR to "
            "a writable folder with free space, then run the command again."
        )
    from jaxii.distributed import processes
    from jaxii.distributed.rendezvous import ProcessLost
    from jaxii.train.checkpoint import FailedSave
    from jaxii.train.trainer import Diverged, Preempted

    if isinstance(error, Preempted):
        return PREEMPTED, f"{error}; run the same command again to resume."
    if isinstance(error, Diverged | FailedSave | CheckFailed | ProcessLost):
        return FAILED, str(error)
    if place is None:
        raise error
    traceback.print_exception(error)
    return FAILED, processes.failure(place, error)


def help_text(words: list[str]) -> str:
    """Returns the help of the first command among the words, or an overview."""
    for word in words:
        if word in COMMANDS:
            return _command_help(word)
    lines = [
        "jaxii trains multi-label image classifiers, from label files to a submission.",
        "",
        "usage: python -m jaxii.main [COMMAND] [FLAGS]   (for details: COMMAND --help)",
        "",
    ]
    for name, command in COMMANDS.items():
        summary = command.HELP.partition("\n\n")[0]
        text = summary + " (Default command.)" * (name == DEFAULT)
        lines.append(_entry(name, text, 10))
    return "\n".join(lines)


def _command_help(name: str) -> str:
    flags = declared(name)
    usage = f"usage: python -m jaxii.main {name} [FLAGS] {flags.placeholder}".rstrip()
    lines = "\n".join(
        _entry(form, text, COLUMN) if form else f"\n{textwrap.fill(text, WIDTH)}"
        for form, text in flags.entries
    )
    return f"{usage}\n\n{COMMANDS[name].HELP.replace('{flags}', lines)}"


def _entry(name: str, text: str, column: int) -> str:
    """Returns a name with its description, wrapped and indented to a column."""
    wrapped = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False)
    first = f"{name:{column}}" if len(name) < column else f"{name}\n{'':{column}}"
    return first + f"\n{'':{column}}".join(wrapped)


def declared(command: str, argv: list[str] | None = None) -> Flags:
    """Returns the flags of a command, not parsed."""
    flags = Flags(argv or [])
    COMMANDS[command].declare(flags)
    return flags


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """Returns the command, and the words without it.

    The command is the first word that is neither a flag nor the value of one.

    Raises:
      InputError: If there is no such command.
    """
    position, switches = 0, None
    while position < len(words) and words[position].startswith("-"):
        name, has_value, _ = words[position].lstrip("-").partition("=")
        if switches is None:
            switches = _switches()
        position += 1 if has_value or name in switches else 2
    if position >= len(words):
        return DEFAULT, words
    command = words[position]
    if command not in COMMANDS:
        raise InputError(
            f"{command!r} is not a command; {nearest(command, COMMANDS)}use one of "
            f"{', '.join(COMMANDS)}."
        )
    return command, words[:position] + words[position + 1 :]


def _switches() -> set[str]:
    """Returns the flags of all commands that take no value, also with prefix "no"."""
    values = [declared(command).values for command in COMMANDS]
    names = {name for each in values for name in each if each[name].boolean}
    return names | {f"no{name}" for name in names}


def parse(command: str, argv: list[str]) -> Flags:
    """Parses the flags of a command and loads the recipe that --config names.

    Args:
      command: One of `COMMANDS`.
      argv: The program, then flags and words, without the command.

    Raises:
      InputError: If the command has no such flag, or a value cannot be used.
    """
    flags = declared(command, argv)
    recipe = _recipe(argv) if "config" in flags.values else None
    if recipe is not None:
        _check_recipe(recipe, argv)
    try:
        flags.words = flags.values(argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
        raise _unknown_flag(command, error) from error
    except absl_flags.IllegalFlagValueError as error:
        raise _bad_value(flags, recipe, error) from error
    except absl_flags.Error as error:
        raise InputError(f"{error}; see {command} --help.") from error
    except Exception as error:
        # A recipe is code of the user and may raise any exception.
        raise recipe_error(str(recipe), error, flag="--config=") from error
    if recipe is not None:
        check_returned(flags.config, f"--config={recipe}")
    if flags.words and not flags.placeholder:
        raise InputError(
            f"{command} takes flags only, not {flags.words[0]!r}; see {command} --help."
        )
    return flags


def _recipe(argv: list[str]) -> str | None:
    """Returns the value of --config, before the flags are parsed."""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            return value if equals else " ".join(argv[i + 1 : i + 2])
    return None


def _check_recipe(recipe: str, argv: list[str]) -> None:
    """Raises InputError if the recipe is not a file or an override names no field."""
    path = Path(recipe.partition(":")[0])
    if not path.is_file():
        fix = nearest_path(path) or "give a recipe such as configs/f2_multitask.py."
        raise InputError(f"--config={recipe} is not a file; {fix}")
    names = field_names()
    for word in argv:
        # Every stage has the fields of the first; a term has any name.
        given = word.removeprefix("--config.").partition("=")[0]
        name = re.sub(r"^stages\[\d+\]", "stages[0]", given)
        name = re.sub(r"^(stages\[0\]\.terms)\..*", r"\1", name)
        if word.startswith("--config.") and name not in names:
            sections = [name for name in names if name.isidentifier()]
            near = difflib.get_close_matches(name, names, n=3) or sections
            raise InputError(f"--config.{given} is not a field; use {', '.join(near)}.")


def _unknown_flag(command: str, error: absl_flags.UnrecognizedFlagError) -> InputError:
    name, dot, _ = error.flagname.partition(".")
    owners = [
        other
        for other in COMMANDS
        if (values := declared(other).values)
        and (name in values or name.removeprefix("no") in values)
    ]
    if command in owners and dot:
        return InputError(
            f"--{error.flagname} overrides a field of a recipe, but none is given; add "
            "--config=FILE before it."
        )
    if owners:
        return InputError(
            f"{command} does not take --{error.flagname}; it is a flag of "
            f"{', '.join(owners)}; see {command} --help."
        )
    return InputError(f"{error}; see {command} --help.")


def _bad_value(flags: Flags, recipe: str | None, error: Exception) -> InputError:
    text = str(error).partition("\n")[0]
    if text.startswith(f"flag --config={recipe}:"):
        return recipe_error(str(recipe), error, flag="--config=")
    name = text.removeprefix("flag --").partition("=")[0]
    choices = ()
    if name in flags.values:
        flag = flags.values[name]
        if name.startswith("config.") and flag.default is not None:
            text += f"; give a value like the default, {flag.default!r}"
        choices = getattr(flag.parser, "enum_values", ())
    near = nearest(text.partition("=")[2].partition(":")[0], choices)
    return InputError(f"{text.removeprefix('flag ')}; {near}see --help.")


def _set_outputs() -> None:
    """Opens stdout and stderr if closed; escapes characters they cannot encode."""
    # Occupies the descriptors of closed outputs, so that no other file gets them.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _set_environment() -> None:
    """Reduces the logging of libraries; call before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # OpenCV logs damaged images; jaxii reports them itself.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    absl_logging.set_verbosity(absl_logging.ERROR)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(_is_not_from_orbax)
    # Matplotlib warns of a read-only home folder, which it does not need.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs a dozen tracebacks for a failed save, and asyncio logs those of its
    # tasks, whose files the message names; jaxii prints one line.
    is_task = record.name == "asyncio"
    return "orbax" not in (record.getMessage() if is_task else record.pathname)
