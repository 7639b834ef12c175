"""Entry point: `python -m jaxii.main`, or `jaxii` once installed; see `jaxii.cli`."""

import contextlib
import os
import signal
import sys
from pathlib import Path

# glibc's settings, which it reads when a process starts.
ALLOCATOR = "GLIBC_TUNABLES"
# When Linux uses huge pages: "always", on request ("[madvise]") or never.
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit code. See `jaxii.cli.dispatch.main`."""
    # Imported here so that `run` also handles an interrupt during the imports.
    from jaxii.cli import dispatch

    return dispatch.main(argv)


def run() -> None:
    """Runs the command line and exits with its code."""
    sys.unraisablehook = _unraisable
    try:
        use_huge_pages()
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        _end_interrupted()


def use_huge_pages() -> None:
    """Starts this process again with huge pages in glibc's allocator.

    XLA's CPU backend allocates its intermediate results again in every step, and Linux
    clears their pages, 4 kB at a time: 290,000 pages and a tenth of the time of a step
    of ResNet-50 with 8 images of 224 pixels. See "Memory Allocation Tunables" in the
    GNU C Library's manual.

    Does nothing if `ALLOCATOR` is set, even to an empty text, if Linux does not give
    huge pages on request, or under a debugger.
    """
    if ALLOCATOR in os.environ or sys.gettrace() or not sys.executable:
        return
    with contextlib.suppress(OSError):
        if "[madvise]" in HUGE_PAGES.read_text():
            os.environ[ALLOCATOR] = "glibc.malloc.hugetlb=1"
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
