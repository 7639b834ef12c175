"""How a stage's checkpoints are written: Orbax's manager and what it is given.

`checkpoint` decides when, and what comes of a failure.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from jaxii import manifest
from jaxii.manifest import Manifest, describe_all
from jaxii.storage import at, sizes_below
from jaxii.train.stages import ENTERS_FROM, Saved, choose
from jaxii.train.state import TrainState, Tree

_MODEL_FIELDS = ("params", "batch_stats", "average_params")
# Where a checkpoint that is no longer kept goes before its files are deleted.
REPLACED = ".replaced"
# Files of Orbax that are still written to when the manifest is.
NOT_LISTED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def make_manager(
    folder: epath.Path, *, read_only: bool, meet: Callable[..., None]
) -> ocp.CheckpointManager:
    """Returns what writes and reads the checkpoints of one stage.

    Args:
      folder: of the stage's checkpoints.
      read_only: leave alone what a save that is going on elsewhere has half written.
      meet: waits for the other processes, `meet(key=, timeout_ms=)`.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_LastAndBest(),
        # Without it the metrics are not written, and a run that is resumed forgets
        # which checkpoint is its best.
        best_fn=_metric,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        todelete_subdir=REPLACED,
        temporary_path_class=_path_class(folder),
        async_options=ocp.AsyncOptions(barrier_sync_fn=meet),
    )
    return ocp.CheckpointManager(
        folder,
        options=options,
        # Named here, not found out at the first save or restore: until then the shapes
        # of what is on disk could not be asked for.
        item_handlers={
            "model": ocp.StandardCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )


class _WithManifest:
    """Writes the manifest of a checkpoint when all else of it is on disk.

    It is there before the checkpoint has its name, so that none is ever without it.
    Only the lead process finalizes. Orbax writes `NOT_LISTED` after it.
    """

    async def finalize(self) -> None:
        await asyncio.to_thread(_write_manifest, self.get())  # pyright: ignore[reportAttributeAccessIssue]
        await super().finalize()  # pyright: ignore[reportAttributeAccessIssue]


class _OnDisk(_WithManifest, ocp.path.atomicity.AtomicRenameTemporaryPath):
    pass


class _InBucket(_WithManifest, ocp.path.atomicity.CommitFileTemporaryPath):
    pass


def _path_class(folder: epath.Path) -> type[_OnDisk] | type[_InBucket]:
    return _InBucket if "://" in os.fspath(folder) else _OnDisk


def _write_manifest(folder: epath.Path) -> None:
    path = at(os.fspath(folder))
    names = sizes_below(path).keys() - NOT_LISTED
    Manifest(describe_all(path, sorted(names))).save(path / manifest.NAME)


def start(
    manager: ocp.CheckpointManager, state: TrainState, record: Mapping[str, Any]
) -> None:
    """Starts to save; returns when the arrays have been copied to the host."""
    model, training = split(state)
    metric = record["metric"]
    manager.save(
        record["step"],
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            training=ocp.args.StandardSave(training),
            metadata=ocp.args.JsonSave(record),
        ),
        metrics=None if metric is None else {"metric": metric},
        force=True,
    )


def save(
    manager: ocp.CheckpointManager, state: TrainState, record: Mapping[str, Any]
) -> None:
    """Saves a state, and returns when it is on disk."""
    start(manager, state, record)
    manager.wait_until_finished()


def split(state: TrainState) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Divides a state into what evaluation needs and what only training needs."""
    fields = {name: value for name, value in vars(state).items() if value is not None}
    model = {name: fields.pop(name) for name in _MODEL_FIELDS if name in fields}
    return model, fields


class _LastAndBest(managers.PreservationPolicy):
    """Keeps what `choose` picks, by its own rule for equal and missing metrics."""

    def should_preserve(
        self,
        # Of `PolicyCheckpointInfo`, a protocol that cannot be checked at run time.
        checkpoints: Sequence[Any],
        *,
        context: managers.PreservationContext,
    ) -> list[bool]:
        saved = [
            Saved(
                stage="",
                step=info.step,
                first_step=0,
                metric=None if info.metrics is None else _metric(info.metrics),
            )
            for info in checkpoints
        ]
        kept = {choose(saved, which).step for which in ENTERS_FROM} if saved else ()
        return [info.step in kept for info in checkpoints]


def _metric(metrics: Mapping[str, float]) -> float:
    # The one figure that was saved, whatever the name it was saved by.
    (value,) = metrics.values()
    return value
