"""Runs commands of jaxii in forked children of a process that has all imports.

A command in its own process spends seconds on imports; a fork spends none. The parent
never touches a device, because XLA's threads do not survive a fork.
"""

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Files for the output of a child, in its folder.
STDOUT, STDERR = "stdout.txt", "stderr.txt"
_OPENED = 0x20
_EVENT = struct.Struct("iIII")


def prepare_imports(cache: Path) -> None:
    """Imports what the commands import, for one CPU device, without touching it.

    Args:
      cache: Folder of compiled programs, shared by all children.
    """
    # Programs run once here, and with little optimisation they compile in half the
    # time.
    flags = (
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_multi_thread_eigen=false",
    )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # JAX warns of every fork, because it cannot know that no device was touched.
    warnings.filterwarnings("ignore", message=".*fork.*")
    from jaxii import main  # noqa: F401
    from jaxii.report import comparison_page, page  # noqa: F401

    gc.collect()
    # Keeps the children from copying pages only because the collector visits them.
    gc.freeze()


def command(*words: str) -> Callable[[], int]:
    """Returns a call of `jaxii WORDS`, for `Child`."""

    def act() -> int:
        from jaxii import main

        sys.argv = ["jaxii", *words]
        return main.main(sys.argv)

    return act


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
      code: Exit code, or minus the signal that ended the child.
      cpu_seconds: Processor time.
      wall_seconds: Wall-clock time.
      peak_bytes: Peak memory, including that of the parent at the fork.
    """

    code: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int = 0

    @property
    def hung(self) -> bool:
        """Whether the child exceeded its time."""
        return self.code == -signal.SIGALRM


def start(act: Callable[[], int], folder: Path, most_seconds: int) -> int:
    """Forks a child that calls `act` in a folder; returns its process id.

    The exit code is the result of `act`, or 1 with a traceback.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # By default, the alarm ends the process, whatever it waits for.
        signal.alarm(most_seconds)
        os.chdir(folder)
        for name, number in ((STDOUT, 1), (STDERR, 2)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(most_seconds - 1, file=2)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # As at the end of the interpreter: a thread that never ends is a hang.
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    os._exit(code)


def run_all(
    jobs: Iterable[tuple[Any, Callable[[], int], Callable[[], Path]]],
    *,
    at_once: int,
    most_seconds: int,
) -> Iterator[tuple[Any, Path, Ended]]:
    """Runs children, `at_once` at a time; yields each when it has ended.

    Args:
      jobs: An identifier, the function to call, and a function that makes its folder.
      at_once: Number of children at a time.
      most_seconds: Time limit of each.

    Yields:
      The identifier of the job, its folder, and how it ended.
    """
    running: dict[int, tuple[Any, Path, float]] = {}
    waiting = iter(jobs)
    more = True
    try:
        while more or running:
            while more and len(running) < at_once:
                job = next(waiting, None)
                if job is None:
                    more = False
                    break
                name, act, make = job
                folder = make()
                pid = start(act, folder, most_seconds)
                running[pid] = (name, folder, time.monotonic())
            for pid in list(running):
                found, status, usage = os.wait4(pid, os.WNOHANG)
                if not found:
                    continue
                name, folder, begun = running.pop(pid)
                yield (
                    name,
                    folder,
                    Ended(
                        os.waitstatus_to_exitcode(status),
                        usage.ru_utime + usage.ru_stime,
                        time.monotonic() - begun,
                        usage.ru_maxrss * 1024,
                    ),
                )
            time.sleep(0.005)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def said(folder: Path) -> str:
    """Returns the end of a child's stderr."""
    return (folder / STDERR).read_text(errors="replace")[-4000:]


class Watch:
    """Records which files below a folder are opened by any process (Linux).

    Args:
      folder: Watched with everything that it contains now.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle = libc.inotify_init1(os.O_NONBLOCK)
        self._places = {}
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            number = libc.inotify_add_watch(self._handle, os.fsencode(path), _OPENED)
            if number < 0:
                raise OSError(ctypes.get_errno(), "inotify cannot watch", str(path))
            self._places[number] = path

    def opened(self) -> set[str]:
        """Stops; returns the opened files and folders, relative to the folder."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                events = os.read(self._handle, 1 << 20)
                while events:
                    place, _, _, length = _EVENT.unpack_from(events)
                    name = events[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                    events = events[_EVENT.size + length :]
                    if place in self._places:
                        path = self._places[place] / os.fsdecode(name)
                        found.add(path.relative_to(self._folder).as_posix())
        os.close(self._handle)
        return found
