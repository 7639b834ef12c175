"""Saves 200 times while disks fill up, permissions change and processes are killed.

    python -m tests.benchmarks.failing_saves [--saves=200]

A worker process saves the state of a small network through `Checkpoints`, as the loop
does. Most saves are disturbed at a random moment (seeded): the disk is full (a small
file system if mounting is allowed, else a limit on the size of a file), a folder
becomes read-only, or the worker is killed. After each save, the checkpoints that a new
start would find are listed, and each is restored and compared bit for bit with what was
saved. Exit code 1 if a checkpoint is wrong or lost, or if a failure is not reported.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.models.multitask import make_network
from jaxii.train.checkpoint import Checkpoints, FailedSave
from jaxii.train.optimizer import make_optimizer
from jaxii.train.stages import Saved
from jaxii.train.state import new_state
from tests.small_runs import metadata_of

STAGE, LABEL_HASH = "only", "0123456789abcdef"
KINDS = ("none", "disk full", "permission", "kill")
PRELOADED = ["jaxii.models.multitask", "jaxii.train.checkpoint", "optax"]
DISK_BYTES = 32 << 20
CAPABILITIES_TO_IGNORE_PERMISSIONS = 0b110
MOST_SECONDS = 120.0


@functools.cache
def shapes():
    """Returns the shapes of the state of a small ResNet-18, about 2 MB."""
    network = make_network(depth=18, num_classes=50, embedding_dim=16, width=8)

    def make(key):
        params, batch_stats = network.init(key)
        schedule = optax.constant_schedule(0.1)
        return new_state(
            params=params,
            batch_stats=batch_stats,
            optimizer=make_optimizer(name="sgd", schedule=schedule, weight_decay=0.0),
            step=0,
            with_average=True,
        )

    sharding = replicated(make_mesh(jax.devices()[:1]))
    return jax.tree.map(
        lambda leaf: leaf.update(sharding=sharding),
        jax.eval_shape(make, jax.random.key(0)),
    )


def state_of(step):
    """Returns the state to save at a step; its numbers are unique to the step."""
    rng = np.random.default_rng(step)

    def leaf(like):
        values = rng.integers(-(2**20), 2**20, like.shape)
        return jax.device_put(values.astype(like.dtype), like.sharding)

    return jax.tree.map(leaf, shapes())


def obey_permissions():
    """Drops the capabilities by which root ignores permissions; call before threads."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for i in range(2):
        sets[i] &= ~CAPABILITIES_TO_IGNORE_PERMISSIONS
    libc.capset(header, sets)


def work(folder, pipe):
    """Saves each (step, metric) that it receives, and replies with the error."""
    obey_permissions()
    # Orbax's threads write a dozen tracebacks per failure.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    checkpoints = Checkpoints(folder, [STAGE], LABEL_HASH)
    pipe.send("ready")
    while True:
        step, metric, most_file_bytes = pipe.recv()
        state = state_of(step)
        saved = Saved(stage=STAGE, step=step, first_step=0, metric=metric)
        pipe.send("started")
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, -1))
        try:
            checkpoints.save(metadata_of(saved), state)
            checkpoints.wait()
            answer = ""
        except FailedSave as failure:
            answer = str(failure)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        pipe.send(answer)


class Rehearsal:
    """A folder, the worker that saves there, and the checkpoints expected there."""

    def __init__(self, folder, seed, has_own_disk):
        self.folder, self.has_own_disk = Path(folder), has_own_disk
        self.rng = random.Random(seed)
        # The parent of the forks has imported everything and started nothing.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.worker = self.pipe = None
        self.step, self.metrics, self.kept = 0, {}, set()
        self.seconds = 0.5
        self.counts = collections.Counter()
        self.wrong = []

    def start_worker(self):
        if self.worker is None or not self.worker.is_alive():
            self.pipe, far = self.context.Pipe()
            self.worker = self.context.Process(
                target=work, args=(str(self.folder), far), daemon=True
            )
            self.worker.start()
            far.close()
            self.answer()

    def stop_worker(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.join()

    def answer(self):
        if not self.pipe.poll(MOST_SECONDS):
            raise TimeoutError(f"the worker has not replied for {MOST_SECONDS} s")
        return self.pipe.recv()

    def save(self, kind):
        """Saves the next step, disturbed; returns the worker's reply."""
        self.start_worker()
        self.step += 1
        self.metrics[self.step] = self.rng.random()
        most_file_bytes = -1
        filler = self.folder / "filler"
        if kind == "disk full":
            room = int(self.rng.random() * 2.5e6)
            if self.has_own_disk:
                fill(filler, room)
            else:
                most_file_bytes = room // 8
        self.pipe.send((self.step, self.metrics[self.step], most_file_bytes))
        self.answer()
        start = time.monotonic()
        closed = {}
        if kind in ("permission", "kill"):
            time.sleep(self.rng.random() * 1.2 * self.seconds)
            if kind == "kill":
                self.worker.kill()
            else:
                closed = self.close_a_folder()
        said = None
        with contextlib.suppress(EOFError, ConnectionResetError):
            said = self.answer()
        if kind == "none":
            self.seconds = 0.5 * self.seconds + 0.5 * (time.monotonic() - start)
        for path, mode in closed.items():
            if path.exists():
                path.chmod(mode)
        filler.unlink(missing_ok=True)
        if kind == "kill":
            self.worker.join()
        return said

    def close_a_folder(self):
        """Makes a folder of the checkpoints read-only."""
        top = self.folder / "checkpoints" / STAGE
        choices = [top, *top.glob("*tmp*"), *top.glob("*tmp*/*tmp*")]
        path = self.rng.choice(choices)
        with contextlib.suppress(FileNotFoundError):
            mode = path.stat().st_mode
            path.chmod(0o555)
            return {path: mode, self.final(path): mode}
        return {}

    def final(self, path):
        """Returns the final name of a temporary folder."""
        parts = [part.partition(".orbax")[0] for part in path.parts]
        return Path(*parts)

    def look(self, kind, said):
        """Lists, restores and compares checkpoints as a new start does."""
        checkpoints = Checkpoints(self.folder, [STAGE], LABEL_HASH)
        found = checkpoints.saved().get(STAGE, [])
        steps = {saved.step for saved in found}
        self.counts["listed"] += len(steps)
        for saved in found:
            try:
                restored = checkpoints.restore_state(saved, shapes())
            except Exception as error:
                self.wrong.append(f"step {saved.step} does not restore: {error}")
                continue
            leaves = jax.tree.leaves(restored), jax.tree.leaves(state_of(saved.step))
            if all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)):
                self.counts["restored"] += 1
            else:
                self.wrong.append(f"step {saved.step} differs from what was saved")
        checkpoints.close()
        self.check_kept(steps)
        if said == "" and self.step not in steps:
            self.wrong.append(f"{kind}: step {self.step} is missing, unreported")
        if kind != "none":
            self.counts[kind] += 1
            self.counts[f"{kind}: failed"] += self.step not in steps
        elif said:
            self.wrong.append(f"step {self.step} failed undisturbed: {said}")
        self.counts["reported"] += bool(said)

    def check_kept(self, steps):
        """Checks that the last and the best complete checkpoint are kept."""
        if self.step in steps:
            self.kept.add(self.step)
        if self.kept:
            needed = {max(self.kept), max(self.kept, key=self.metrics.__getitem__)}
            if needed - steps:
                self.wrong.append(
                    f"at step {self.step} steps {needed - steps} are lost"
                )
            self.kept = needed & steps


def fill(path, room):
    """Fills the disk of a file except for `room` bytes."""
    free = shutil.disk_usage(path.parent).free
    with contextlib.suppress(OSError), path.open("wb") as file:
        file.write(b"\0" * max(free - room, 0))


@contextlib.contextmanager
def small_disk(folder):
    """Mounts a small file system on a folder; yields whether that was allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def rehearse(folder, *, saves, seed=0, on_save=lambda line: None):
    """Saves `saves` times; returns counts and errors."""
    with small_disk(folder) as has_own_disk:
        rehearsal = Rehearsal(folder, seed, has_own_disk)
        try:
            for i in range(saves):
                # The first kind is undisturbed, so that there is a checkpoint to keep.
                kind = KINDS[i % len(KINDS)]
                said = rehearsal.save(kind)
                rehearsal.look(kind, said)
                on_save(f"{rehearsal.step:4} {kind:10} {said}")
        finally:
            rehearsal.stop_worker()
    return rehearsal.counts, rehearsal.wrong


def summary(saves, counts, wrong):
    failures = ", ".join(
        f"{counts[f'{kind}: failed']} of {counts[kind]} by {kind}" for kind in KINDS[1:]
    )
    return (
        f"{saves} saves; failed: {failures}; {counts['reported']} reported by the "
        f"process; listed {counts['listed']}, restored bit for bit "
        f"{counts['restored']}, wrong {len(wrong)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = rehearse(
            folder,
            saves=args.saves,
            seed=args.seed,
            on_save=print if args.verbose else lambda line: None,
        )
    for line in wrong:
        print(f"wrong: {line}")
    print(f"{summary(args.saves, counts, wrong)} ({time.monotonic() - start:.0f} s)")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
