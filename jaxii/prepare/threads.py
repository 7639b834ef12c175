"""Runs jobs in threads and reports their progress from the calling thread."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import cv2

from jaxii.console import OnProgress

# Called with a number of finished items.
Advance = Callable[[int], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


def in_threads(
    work: Callable[[Job, range, Advance], Result],
    jobs: Sequence[tuple[Job, range]],
    num_threads: int,
    on_progress: OnProgress,
    what: str,
) -> list[Result]:
    """Returns the result of each job, in order.

    Args:
      work: Called in a thread with a job, its items, and a function that takes a number
        of finished items; its exceptions stop the work.
      jobs: Jobs and their items, such as the path of a shard and its rows.
      num_threads: The most threads at a time.
      on_progress: Called from this thread with (items done, items in all, what).
      what: See `on_progress`.
    """
    done, total = _Counter(), sum(len(items) for _, items in jobs)
    pool = ThreadPoolExecutor(max_workers=max(1, min(num_threads, len(jobs))))
    with one_thread_each():
        try:
            futures = [pool.submit(work, job, items, done.add) for job, items in jobs]
            for _ in _until_done(futures):
                on_progress(done.value, total, what)
            return [future.result() for future in futures]
        finally:
            done.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _until_done(futures: Sequence[Future]) -> Iterator[None]:
    """Yields five times per second until all futures are done; raises their errors."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.2)
        for future in finished:
            future.result()
        yield


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Makes OpenCV use only the calling thread."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Counter:
    """Counts the items done in all threads, and signals threads to stop."""

    def __init__(self):
        self.value = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def add(self, number: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.value += number


class _Stopped(Exception):
    pass
