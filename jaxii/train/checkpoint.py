"""Saves a run's checkpoints with Orbax in the background, and restores them.

`WORKDIR/checkpoints/<stage>/<step>/` holds `model` (parameters, their average and
BatchNorm statistics), `training` (optimizer and counters), `metadata` (JSON) and
`manifest.json` (size and hash of every file). A step's folder has its name only while
it is complete. The last and the best checkpoint of each stage are kept. Files are
verified by their hashes before they are restored.
"""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from jaxii import manifest
from jaxii.errors import InputError, nearest
from jaxii.manifest import File, Manifest
from jaxii.storage import AnyPath, at, names_in
from jaxii.train.checkpoint_manager import REPLACED, make_manager, save, split, start
from jaxii.train.stages import BatchSize, Origin, Saved, choose
from jaxii.train.state import TrainState, Tree


class FailedSave(Exception):
    """A checkpoint could not be saved; earlier checkpoints are unaffected.

    Attributes:
      last: Step of the stage's last complete checkpoint; None if there is none.
    """

    def __init__(self, folder: epath.Path, step: int, error: Exception):
        self.last = None
        # The folder may be unreadable too; errors of buckets are not OSErrors.
        with contextlib.suppress(Exception):
            self.last = max(complete_steps(at(os.fspath(folder))), default=None)
        if self.last is None:
            rest = "restarts the stage, which has no complete checkpoint yet"
        else:
            rest = f"continues from step {self.last}, which is complete"
        super().__init__(
            f"saving the checkpoint of step {step} in {folder} failed: "
            f"{_reason(error)}. Check the free space and permissions there; the same "
            f"command {rest}."
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """Metadata of a checkpoint and its run, stored as JSON in the file `metadata`.

    Attributes:
      provenance: JSON of `evaluation.provenance.Provenance`.
      config_hash: Content hash of the configuration.
      config: The resolved configuration, nested.
      recipe: The recipe of the configuration.
      data_hash: Content hash of the dataset.
      files: Size and hash of the workdir's label, embedding and seen-image files.
      train_step_compilations: Number of compilations of the stage's train step.
      history: `history.jsonl` when the save began; None without one.
      label_hash: Content hash of the vocabulary.
      batch_sizes: Batch sizes of the updates so far; empty if all had that of `config`.
      short_side_pixels: Short side that `prepare` reduced the images of the dataset to;
        None if it was not recorded.
      saved: Place in the run, and metric.
    """

    provenance: Mapping[str, Any]
    config_hash: str
    config: Mapping[str, Any]
    recipe: Origin
    data_hash: str
    files: Mapping[str, File]
    train_step_compilations: int
    history: File | None
    label_hash: str
    batch_sizes: tuple[BatchSize, ...] = ()
    short_side_pixels: int | None = None
    saved: Saved

    def to_json(self) -> dict[str, Any]:
        """Returns one object, with the fields of `saved` among its keys."""
        plain = asdict(self)
        saved = plain.pop("saved")
        # Earlier versions, which do not know these keys, can read other checkpoints.
        for name in ("batch_sizes", "short_side_pixels"):
            if not plain[name]:
                del plain[name]
        return plain | saved

    def all_batch_sizes(self) -> tuple[BatchSize, ...]:
        """Returns the batch sizes of the updates so far, at least one."""
        own = self.config["global_batch_size"], self.config["micro_batches"]
        return self.batch_sizes or (BatchSize(0, *own),)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], path: object) -> "CheckpointMetadata":
        """Returns the metadata that `to_json` wrote.

        Args:
          record: The JSON object.
          path: File of the record, for the error.

        Raises:
          InputError: If a key is missing or unknown.
        """
        record = {"batch_sizes": [], "short_side_pixels": None, **record}
        names = {field.name for field in fields(cls)} - {"saved"}
        of_saved = {field.name for field in fields(Saved)}
        lacking = sorted((names | of_saved) - record.keys())
        unknown = sorted(record.keys() - names - of_saved)
        if lacking or unknown:
            raise InputError(
                f"{path} does not have the expected keys (missing: "
                f"{', '.join(lacking) or 'none'}; unknown: "
                f"{', '.join(unknown) or 'none'}); use the version of jaxii that wrote "
                "it, or train again in another workdir."
            )
        own = {name: record[name] for name in names}
        own["files"] = {name: File(**file) for name, file in record["files"].items()}
        if own["history"] is not None:
            own["history"] = File(**own["history"])
        own["batch_sizes"] = tuple(BatchSize(*size) for size in own["batch_sizes"])
        saved = {name: record[name] for name in of_saved}
        saved["evaluations"] = tuple(map(tuple, saved["evaluations"]))
        return cls(**own, saved=Saved(**saved))


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: Folder of the run.
      stage_names: Names of the run's stages, in order.
      label_hash: Content hash of the vocabulary, which checkpoints must share; "" skips
        the check when only reading.
      read_only: Whether to leave unfinished saves of other processes alone.
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
        # Orbax needs absolute paths; bucket paths are absolute.
        path = path.resolve() if isinstance(path, Path) else path
        self.directory = epath.Path(path) / "checkpoints"
        self._stage_names = tuple(stage_names)
        self._label_hash = label_hash
        self._read_only = read_only
        self._managers: dict[str, ocp.CheckpointManager] = {}
        # Stage, step and part of verified checkpoints.
        self._verified: set[tuple[str, int, str]] = set()
        # Stage and step of the running save; None once its end was detected.
        self._started: tuple[str, int] | None = None
        # A single process saves in a thread: starting a save takes Orbax 0.1 s or more.
        self._thread = ThreadPoolExecutor(1, "save")
        self._writing: Future[None] | None = None
        self._failed = threading.Event()

    def saved(self) -> dict[str, list[Saved]]:
        """Returns stage name -> its complete checkpoints, by step.

        Raises:
          FailedSave: If the last save failed.
          InputError: If a checkpoint has other labels or is damaged.
        """
        self.wait()
        found = {}
        for name in self._stage_names:
            if (self.directory / name).exists():
                found[name] = [
                    self._metadata(name, step).saved
                    for step in sorted(self._manager(name).all_steps())
                    # A running training may have replaced the checkpoint.
                    if self._record_file(name, step).exists()
                ]
        return found

    def best_of(self, stage: str = "") -> Saved:
        """Returns the best checkpoint of a stage; "" is the last trained stage.

        Raises:
          InputError: If the stage has no checkpoint.
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
            raise InputError(
                f"--stage={stage} has no checkpoint; {near}use one of "
                f"{', '.join(trained)}."
            )
        return choose(found[stage or trained[-1]], "best")

    def latest(self) -> Saved | None:
        """Returns the checkpoint with the most steps; None if there is none."""
        every = [saved for found in self.saved().values() for saved in found]
        return max(every, key=lambda saved: saved.step, default=None)

    def metadata(self, saved: Saved) -> CheckpointMetadata:
        """Returns the metadata of a checkpoint.

        Raises:
          InputError: If a running training replaced the checkpoint.
        """
        with self._reading(saved):
            return self._metadata(saved.stage, saved.step)

    def content_hash(self, saved: Saved) -> str:
        """Returns a hexadecimal digest of a checkpoint's arrays and metadata.

        It covers no path: the checkpoint of a copied or moved workdir has the same one.

        Raises:
          InputError: If a running training replaced the checkpoint.
        """
        path = at(os.fspath(self.directory)) / saved.stage / str(saved.step)
        listed = Manifest.load(path / manifest.NAME, fix="run the same command again")
        return listed.content_hash()

    def save(self, metadata: CheckpointMetadata, state: TrainState) -> None:
        """Starts a save; the caller may donate the state's buffers afterwards.

        Memory: in single-process runs, saving doubles the state's device memory. Runs
        of several processes copy the state to their hosts before this returns.

        Args:
          metadata: Metadata of the checkpoint.
          state: The state after `metadata.saved.step` updates.

        Raises:
          FailedSave: If this save cannot start, or the previous one failed.
        """
        self.wait()
        saved, record = metadata.saved, metadata.to_json()
        self._failed.clear()
        try:
            manager = self._manager(saved.stage)
            if jax.process_count() == 1:
                # The copy is dispatched, and so made, before the following steps.
                state = jax.device_put(state, may_alias=False)
                self._writing = self._thread.submit(save, manager, state, record)
            else:
                # Orbax's collectives must run in the order of the loop.
                start(manager, state, record)
        except jax.errors.JaxRuntimeError:
            # An error of the devices or of another process, not of the disk.
            raise
        except Exception as error:
            raise self._failure(saved.stage, saved.step, error) from error
        self._started = saved.stage, saved.step

    def restore_state(self, saved: Saved, like: TrainState) -> TrainState:
        """Returns the whole state of a checkpoint.

        Args:
          saved: The checkpoint.
          like: Shape, dtype and sharding of every leaf.

        Raises:
          InputError: If the checkpoint is damaged, or a running training replaced it.
        """
        model, training = split(like)
        with self._reading(saved):
            self._verify(saved, ("model/", "training/"))
            restored = self._manager(saved.stage).restore(
                saved.step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(model),
                    training=ocp.args.StandardRestore(training),
                ),
            )
        leaves = {**restored["model"], **restored["training"]}
        return TrainState(**{"average_params": None, **leaves})

    def restore_model(self, saved: Saved, sharding: Sharding) -> dict[str, Tree]:
        """Returns `params`, `batch_stats` and, if saved, `average_params`.

        The devices may differ from those that saved the model.

        Raises:
          InputError: If the checkpoint is damaged, or a running training replaced it.
        """
        with self._reading(saved):
            self._verify(saved, ("model/",))
            like = ocp.args.StandardRestore(self.model_shapes(saved, sharding))
            return self._manager(saved.stage).restore(
                saved.step, args=ocp.args.Composite(model=like)
            )["model"]

    def model_shapes(
        self, saved: Saved, sharding: Sharding | None = None
    ) -> dict[str, Tree]:
        """Returns the shapes of `restore_model`, without reading the arrays.

        Raises:
          InputError: If a running training replaced the checkpoint.
        """
        with self._reading(saved):
            shapes = self._manager(saved.stage).item_metadata(saved.step)["model"]
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding
            ),
            getattr(shapes, "tree", shapes),
        )

    def check(self) -> None:
        """Polls the running save without waiting.

        Raises:
          FailedSave: If the save failed.
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
        """Waits until the running save is on disk.

        Raises:
          FailedSave: If the save failed; only the first call after it raises.
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
        """Waits for the running save, failed or not.

        Call before exiting on error; Orbax cannot finish during interpreter shutdown.
        """
        if self._writing is not None:
            wait([self._writing])

    def close(self) -> None:
        """Waits for the running save and ends Orbax's threads.

        Raises:
          FailedSave: If the save failed.
        """
        self.wait()
        self._thread.shutdown()
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()

    def _failure(self, name: str, step: int, error: Exception) -> FailedSave:
        """Removes the remains of a failed save and returns its error."""
        folder = self.directory / name
        if jax.process_count() == 1:
            # The manager's list of steps is wrong now; a new one reads the folder.
            manager = self._managers.pop(name, None)
            for _ in range(2):
                # The first call reports the failure again and stops half-way.
                with contextlib.suppress(Exception):
                    if manager is not None:
                        manager.close()
            # Frees the space now, not at the next save.
            with contextlib.suppress(OSError):
                for path in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                    path.rmtree()
        return FailedSave(folder, step, error)

    def _delete_replaced(self, name: str) -> None:
        # Orbax moves a checkpoint to REPLACED before deleting it, so that a killed
        # process leaves no partly deleted checkpoint under its name.
        if jax.process_index() == 0 and not self._read_only:
            with contextlib.suppress(OSError):
                (self.directory / name / REPLACED).rmtree(missing_ok=True)

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Barrier of Orbax's threads that raises at once if this process failed.

        Orbax's own barrier waits 20 minutes for processes that also wait for this one.
        """
        error = sys.exception()
        in_background = threading.current_thread() is not threading.main_thread()
        if error is not None and in_background:
            self._failed.set()
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _reading(self, saved: Saved) -> Iterator[None]:
        """Explains errors in reading a checkpoint that has been replaced meanwhile."""
        try:
            yield
        except Exception as error:
            if saved.step in self._steps(saved.stage):
                raise
            raise InputError(
                f"step {saved.step} of stage {saved.stage} in {self.directory} was "
                "replaced by a newer checkpoint while this command ran; run it again."
            ) from error

    def _verify(self, saved: Saved, parts: tuple[str, ...]) -> None:
        """Checks every byte of the given parts of a checkpoint, once per part."""
        keys = {(saved.stage, saved.step, part) for part in parts} - self._verified
        if keys:
            parts = tuple(part for _, _, part in keys)
            self._check_files(saved.stage, saved.step, parts=parts)
            self._verified |= keys

    def _check_files(self, name: str, step: int, *, parts: tuple[str, ...]) -> None:
        """Checks all sizes, small files, and every byte of the given parts."""
        folder = at(os.fspath(self.directory / name / str(step)))
        try:
            _check(folder, parts, fix="")
        except InputError:
            if step not in self._steps(name):
                # A running training has just replaced the checkpoint.
                raise
            # Finding the fix reads the other checkpoints.
            _check(folder, parts, fix=self._fix(name, step))

    def _fix(self, name: str, step: int) -> str:
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
            f"command to continue from {before[-1]}, which is intact"
        )

    def _is_whole(self, name: str, step: int) -> bool:
        folder = at(os.fspath(self.directory / name / str(step)))
        try:
            _check(folder, ("",), fix="")
        except InputError:
            return False
        return True

    def _steps(self, name: str) -> list[int]:
        """Returns the steps of a stage's complete checkpoints, intact or damaged."""
        return complete_steps(at(os.fspath(self.directory / name)))

    def _metadata(self, name: str, step: int) -> CheckpointMetadata:
        # All processes would have to call Orbax's restore together.
        path = self._record_file(name, step)
        metadata = CheckpointMetadata.from_json(json.loads(path.read_text()), path)
        if self._label_hash not in ("", metadata.label_hash):
            raise InputError(
                f"the checkpoint {self.directory / name / str(step)} has labels with "
                f"hash {metadata.label_hash}, but the dataset has labels with hash "
                f"{self._label_hash}; use the dataset it was trained on, or another "
                "workdir."
            )
        return metadata

    def _record_file(self, name: str, step: int) -> epath.Path:
        return self.directory / name / str(step) / "metadata" / "metadata"

    def _manager(self, name: str) -> ocp.CheckpointManager:
        if name not in self._managers:
            # Checkpoints are checked before Orbax reads them, for one clear error.
            for step in self._steps(name):
                try:
                    self._check_files(name, step, parts=())
                except InputError:
                    # A running training may have just replaced the checkpoint.
                    if step in self._steps(name):
                        raise
            self._delete_replaced(name)
            self._managers[name] = make_manager(
                self.directory / name, read_only=self._read_only, meet=self._meet
            )
        return self._managers[name]


def _check(folder: AnyPath, parts: tuple[str, ...], *, fix: str) -> None:
    """Checks a checkpoint's files; hashes those whose names start with `parts`."""
    path = folder / manifest.NAME
    listed = Manifest.load(path, fix=fix)
    hashed = [name for name in listed.files if name.startswith(parts)]
    listed.check(folder, by=path, fix=fix, hashed=hashed)


def evaluated_params(model: Mapping[str, Tree]) -> Tree:
    """Returns a restored model's averaged parameters if saved, else its parameters."""
    average = model.get("average_params")
    return model["params"] if average is None else average


def complete_steps(folder: AnyPath) -> list[int]:
    """Returns the steps of the complete checkpoints in a stage's folder."""
    if not folder.is_dir():
        return []
    steps = sorted(int(n) for n in names_in(folder) if n.isdecimal())
    if isinstance(folder, Path):
        return steps
    # A bucket cannot rename: Orbax marks complete checkpoints.
    return [s for s in steps if (folder / str(s) / "commit_success.txt").exists()]


def _reason(error: Exception) -> str:
    """Returns the operating system's text of an error, if it has one."""
    text = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore's errors name several files first.
    found = re.search(r"os_error_code='(\d+)'", text)
    if found:
        return os.strerror(int(found[1]))
    return text[:200] or type(error).__name__
