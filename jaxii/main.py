"""Entry point: `python -m jaxii.main`, or `jaxii` once installed; see `jaxii.cli`."""

import contextlib
import os
import signal
import sys


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code. See `jaxii.cli.dispatch.main`."""
    # Imported here so that `run` also handles an interrupt during the imports.
    from jaxii.cli import dispatch

    return dispatch.main(argv)


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.unraisablehook = _unraisable
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        _end_interrupted()


def _unraisable(error: "sys.UnraisableHookArgs") -> None:
    # Python ignores an interrupt in a callback, such as JAX's for garbage collection.
    if issubclass(error.exc_type, KeyboardInterrupt):
        _end_interrupted()
    sys.__unraisablehook__(error)


def _end_interrupted() -> None:
    # Shells stop a script only if the signal itself ended its command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.write(2, b"jaxii: interrupted.\n")
    os.kill(os.getpid(), signal.SIGINT)
    # The kernel does not send it to the first process of a container.
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run()
