"""What of a run is on disk, and how it gets there and back.

`WORKDIR/checkpoints/<stage>/<step>/` through Orbax, in the background: `model`
(parameters, their average, BatchNorm statistics: all that evaluation needs), `training`
(optimizer and counters), `metadata` (JSON) and `manifest.json`, which has the size and
hash of every file. A step's folder appears under its name only when it is complete, and
loses it before it is deleted. Kept are the last checkpoint of a stage and its best.
What is restored is verified before, byte by byte.
"""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from jaxii import manifest
from jaxii.errors import InputError, nearest
from jaxii.manifest import Manifest
from jaxii.storage import AnyPath, at, names_in
from jaxii.train.checkpoint_manager import REPLACED, make_manager, save, split, start
from jaxii.train.stages import Saved, choose
from jaxii.train.state import TrainState, Tree


class FailedSave(Exception):
    """A checkpoint could not be saved; those that were complete still are.

    Args:
      folder: of the stage's checkpoints.
      step: of the checkpoint.
      error: what went wrong.

    Attributes:
      last: step of the last complete checkpoint of the stage, None if there is none.
    """

    def __init__(self, folder: epath.Path, step: int, error: Exception):
        self.last = _last(folder)
        if self.last is None:
            rest = "starts anew: no checkpoint is complete yet"
        else:
            rest = f"goes on from step {self.last}, which is complete"
        super().__init__(
            f"saving the checkpoint of step {step} in {folder} failed: "
            f"{_reason(error)}. See to the space and the permissions there; the same "
            f"command {rest}."
        )


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: folder of the run.
      stage_names: names of the run's stages, in order.
      label_hash: content hash of the vocabulary; checkpoints of another are refused.
        "" refuses none, where nothing is saved.
      read_only: leave alone what a save that is going on elsewhere has half written.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        stage_names: Sequence[str],
        label_hash: str,
        *,
        read_only: bool = False,
    ):
        path = at(workdir)
        # Orbax wants absolute paths, and a bucket's are.
        path = path.resolve() if isinstance(path, Path) else path
        self.directory = epath.Path(path) / "checkpoints"
        self._stage_names = tuple(stage_names)
        self._label_hash = label_hash
        self._read_only = read_only
        self._managers: dict[str, ocp.CheckpointManager] = {}
        # Stage, step and part of what has been read and found whole.
        self._whole: set[tuple[str, int, str]] = set()
        # Stage and step of the save that was started last, until its end was noticed.
        self._started: tuple[str, int] | None = None
        # One process saves in a thread: even the start of a save takes Orbax a tenth
        # of a second and more, in which the loop can go on.
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._failed = threading.Event()

    def saved(self) -> dict[str, list[Saved]]:
        """Returns stage name -> its complete checkpoints, by step.

        Raises:
          FailedSave: the save that was started last did not succeed.
          InputError: If they were made with other labels, or one is damaged.
        """
        self.wait()
        found = {}
        for name in self._stage_names:
            if (self.directory / name).exists():
                found[name] = [
                    self._describe(name, step)
                    for step in sorted(self._manager(name).all_steps())
                    # A run that is going on elsewhere may have replaced it by now.
                    if self._record_file(name, step).exists()
                ]
        return found

    def best_of(self, stage: str = "") -> Saved:
        """Returns the best checkpoint of a stage; "" is the last one trained.

        Raises:
          InputError: nothing, or not this stage, has been trained.
        """
        found = self.saved()
        trained = [name for name in found if found[name]]
        if not trained:
            raise InputError(
                f"{self.directory} has no checkpoint yet; train first with the same "
                "--workdir."
            )
        if stage and stage not in trained:
            near = nearest(stage, trained)
            raise InputError(f"--stage={stage}; {near}use one of {', '.join(trained)}.")
        return choose(found[stage or trained[-1]], "best")

    def latest(self) -> Saved | None:
        """Returns the checkpoint of the most steps; None before the first."""
        every = [saved for found in self.saved().values() for saved in found]
        return max(every, key=lambda saved: saved.step, default=None)

    def metadata(self, saved: Saved) -> dict[str, Any]:
        """Returns the JSON that was saved with a checkpoint."""
        return self._record(saved.stage, saved.step)

    def save(
        self, saved: Saved, state: TrainState, metadata: Mapping[str, Any]
    ) -> None:
        """Starts to save; the steps that follow may have the buffers of the state.

        Memory: until it is saved, a second state on the devices, where there is one
        process. Several copy it to their hosts first, and wait for that.

        Args:
          saved: what this checkpoint says of itself.
          state: the state after `saved.step` updates.
          metadata: anything else to keep with it, as JSON.

        Raises:
          FailedSave: this save could not be started, or the one before has failed.
        """
        self.wait()
        record = {
            **metadata,
            "label_hash": self._label_hash,
            "stage": saved.stage,
            "step": saved.step,
            "first_step": saved.first_step,
            "example": saved.example,
            "first_example": saved.first_example,
            "metric": saved.metric,
            "evaluations": [list(pair) for pair in saved.evaluations],
            "finished": saved.finished,
        }
        self._failed.clear()
        try:
            manager = self._manager(saved.stage)
            if jax.process_count() == 1:
                # Sent off before the steps that follow, and so copied before them.
                state = jax.device_put(state, may_alias=False)
                self._writing = self._thread.submit(save, manager, state, record)
            else:
                # They exchange data meanwhile, in the order of the loop.
                start(manager, state, record)
        except jax.errors.JaxRuntimeError:
            # Of the devices or of another process, not of the disk.
            raise
        except Exception as error:
            raise self._failure(saved.stage, saved.step, error) from error
        self._started = saved.stage, saved.step

    def restore_state(self, saved: Saved, like: TrainState) -> TrainState:
        """Returns the whole state of a checkpoint, as and where `like` says.

        Args:
          saved: the checkpoint.
          like: shapes, dtypes and shardings of every leaf.

        Raises:
          InputError: If the checkpoint is damaged.
        """
        self._verify(saved, ("model/", "training/"))
        model, training = split(like)
        restored = self._manager(saved.stage).restore(
            saved.step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(model),
                training=ocp.args.StandardRestore(training),
            ),
        )
        fields = {**restored["model"], **restored["training"]}
        return TrainState(**{"average_params": None, **fields})

    def restore_model(self, saved: Saved, sharding: Sharding) -> dict[str, Tree]:
        """Returns `params`, `batch_stats` and, where there is one, `average_params`.

        Works on any devices: only the shapes come from the checkpoint.

        Raises:
          InputError: If the checkpoint is damaged.
        """
        self._verify(saved, ("model/",))
        like = self.model_shapes(saved, sharding)
        return self._manager(saved.stage).restore(
            saved.step, args=ocp.args.Composite(model=ocp.args.StandardRestore(like))
        )["model"]

    def model_shapes(
        self, saved: Saved, sharding: Sharding | None = None
    ) -> dict[str, Tree]:
        """Returns what `restore_model` does as shapes, without reading the arrays."""
        shapes = self._manager(saved.stage).item_metadata(saved.step)["model"]
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            getattr(shapes, "tree", shapes),
        )

    def check(self) -> None:
        """Notices whether the save that was started last has ended; does not wait.

        Raises:
          FailedSave: it has, without success.
        """
        if self._started is None:
            return
        if self._writing is not None:
            ended = self._writing.done()
        else:
            ended = not self._managers[self._started[0]].is_saving_in_progress()
        if ended or self._failed.is_set():
            self.wait()

    def wait(self) -> None:
        """Waits until what was started to be saved is on disk.

        Raises:
          FailedSave: it is not; said once.
        """
        if self._started is None:
            return
        (name, step), self._started = self._started, None
        writing, self._writing = self._writing, None
        try:
            if writing is None:
                self._managers[name].wait_until_finished()
            else:
                writing.result()
        except Exception as error:
            if writing is not None and isinstance(error, jax.errors.JaxRuntimeError):
                raise
            raise self._failure(name, step, error) from error
        self._delete_replaced(name)

    def finish(self) -> None:
        """Lets a save that this process has begun come to its end, whatever that is.

        For who ends with an error: Orbax cannot once the interpreter shuts down.
        """
        if self._writing is not None:
            wait([self._writing])

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads.

        Raises:
          FailedSave: the save that was started last did not succeed.
        """
        self.wait()
        self._thread.shutdown()
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()

    def _failure(self, name: str, step: int, error: Exception) -> FailedSave:
        """Returns what is to be said, and leaves nothing of the save behind."""
        folder = self.directory / name
        if jax.process_count() == 1:
            # It counts the failed step, and no longer those that it would have
            # replaced; the next one reads what is there.
            manager = self._managers.pop(name, None)
            for _ in range(2):
                # The first reports the failure again and stops half-way.
                with contextlib.suppress(Exception):
                    if manager is not None:
                        manager.close()
            # The space is wanted now, not by the next save.
            with contextlib.suppress(OSError):
                for path in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    path.rmtree()
        return FailedSave(folder, step, error)

    def _delete_replaced(self, name: str) -> None:
        # Deleted in its place a checkpoint would count, for a while or, where the
        # process is killed, for ever, while parts of it are missing.
        if jax.process_index() == 0 and not self._read_only:
            with contextlib.suppress(OSError):
                (self.directory / name / REPLACED).rmtree(missing_ok=True)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits in a thread of Orbax for the other processes, unless this one failed.

        Orbax would wait for them in that case too, 20 minutes where they in their turn
        wait for this one, and would let nobody know before.
        """
        error = sys.exception()
        in_background = threading.current_thread() is not threading.main_thread()
        if error is not None and in_background:
            self._failed.set()
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _verify(self, saved: Saved, parts: tuple[str, ...]) -> None:
        """Reads every byte of parts of a checkpoint; refuses a damaged one."""
        missing = {p for p in parts if (saved.stage, saved.step, p) not in self._whole}
        if missing:
            self._check_files(saved.stage, saved.step, parts=tuple(missing))
            self._whole |= {(saved.stage, saved.step, part) for part in missing}

    def _check_files(self, name: str, step: int, *, parts: tuple[str, ...]) -> None:
        """Refuses a damaged checkpoint, by sizes, small files and parts read whole."""
        folder = at(os.fspath(self.directory / name / str(step)))
        try:
            _check(folder, parts, fix="")
        except InputError:
            # What to do takes reading other checkpoints to say.
            _check(folder, parts, fix=self._fix(name, step))

    def _fix(self, name: str, step: int) -> str:
        """Returns what to do about a damaged checkpoint."""
        before = [
            f"step {other} of stage {stage}"
            for stage in self._stage_names[: self._stage_names.index(name) + 1]
            for other in self._steps(stage)
            if (stage, other) != (name, step) and self._is_whole(stage, other)
        ]
        folder = self.directory / name / str(step)
        if not before:
            return f"restore {folder} from a copy, or train again in another workdir"
        return (
            f"restore {folder} from a copy, or remove it and train again with the same "
            f"command, which goes on from {before[-1]}, which is whole"
        )

    def _is_whole(self, name: str, step: int) -> bool:
        folder = at(os.fspath(self.directory / name / str(step)))
        try:
            _check(folder, ("",), fix="")
        except InputError:
            return False
        return True

    def _steps(self, name: str) -> list[int]:
        """Returns the steps of a stage's complete checkpoints, damaged or not."""
        folder = at(os.fspath(self.directory / name))
        if not folder.is_dir():
            return []
        steps = sorted(int(n) for n in names_in(folder) if n.isdecimal())
        if isinstance(folder, Path):
            return steps
        # In a bucket nothing is renamed: Orbax marks what is complete.
        return [s for s in steps if (folder / str(s) / "commit_success.txt").exists()]

    def _describe(self, name: str, step: int) -> Saved:
        record = self._record(name, step)
        if self._label_hash not in ("", record["label_hash"]):
            raise InputError(
                f"the checkpoint {self.directory / name / str(step)} was made with "
                f"labels {record['label_hash']} and the data has labels "
                f"{self._label_hash}; use the data it was trained on, or another "
                "workdir."
            )
        return Saved(
            stage=record["stage"],
            step=record["step"],
            first_step=record["first_step"],
            example=record["example"],
            first_example=record["first_example"],
            metric=record["metric"],
            evaluations=tuple((step, metric) for step, metric in record["evaluations"]),
            finished=record["finished"],
        )

    def _record(self, name: str, step: int) -> dict[str, Any]:
        # Not through Orbax, whose restore all processes have to call together.
        return json.loads(self._record_file(name, step).read_text())

    def _record_file(self, name: str, step: int) -> epath.Path:
        return self.directory / name / str(step) / "metadata" / "metadata"

    def _manager(self, name: str) -> ocp.CheckpointManager:
        if name not in self._managers:
            # Before Orbax, which reads metrics and has an error of its own for each.
            for step in self._steps(name):
                try:
                    self._check_files(name, step, parts=())
                except InputError:
                    # Unless a run that is going on elsewhere has just replaced it.
                    if step in self._steps(name):
                        raise
            self._delete_replaced(name)
            self._managers[name] = make_manager(
                self.directory / name, read_only=self._read_only, meet=self._meet
            )
        return self._managers[name]


def _check(folder: AnyPath, parts: tuple[str, ...], *, fix: str) -> None:
    """Refuses a damaged checkpoint.

    Args:
      folder: of the checkpoint.
      parts: beginnings of the names of files to read whole; () for none.
      fix: what to do, for the error.
    """
    path = folder / manifest.NAME
    listed = Manifest.load(path, fix=fix)
    hashed = [name for name in listed.files if name.startswith(parts)]
    listed.check(folder, by=path, fix=fix, hashed=hashed)


def evaluated_params(model: Mapping[str, Tree]) -> Tree:
    """Returns the averaged parameters of a restored model where it has some."""
    average = model.get("average_params")
    return model["params"] if average is None else average


def _last(folder: epath.Path) -> int | None:
    with contextlib.suppress(OSError):
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        return max(steps, default=None)


def _reason(error: Exception) -> str:
    """Returns the system's own words for what went wrong, where there are some."""
    text = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore's errors name several files before they say it.
    found = re.search(r"os_error_code='(\d+)'", text)
    if found:
        return os.strerror(int(found[1]))
    return text[:200] or type(error).__name__
