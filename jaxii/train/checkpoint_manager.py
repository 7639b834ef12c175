"""The Orbax manager of a stage's checkpoints: writing, retention and manifests."""

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
# A replaced checkpoint is moved to this folder before its files are deleted.
REPLACED = ".replaced"
# Files that Orbax writes after the manifest.
NOT_LISTED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def make_manager(
    folder: epath.Path, *, read_only: bool, meet: Callable[..., None]
) -> ocp.CheckpointManager:
    """Returns the manager of one stage's checkpoints.

    Args:
      folder: The stage's folder.
      read_only: Whether to leave unfinished saves of other processes alone.
      meet: Barrier between the processes, `meet(key=, timeout_ms=)`.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_LastAndBest(),
        # Without `best_fn`, Orbax does not write the metrics that a resumed run needs.
        best_fn=_metric,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        # Orbax warns of each value that it ignores if `read_only`.
        create=not read_only,
        save_interval_steps=0 if read_only else 1,
        todelete_subdir=None if read_only else REPLACED,
        temporary_path_class=_InBucket if "://" in os.fspath(folder) else _OnDisk,
        async_options=ocp.AsyncOptions(barrier_sync_fn=meet),
    )
    return _Manager(
        folder,
        options=options,
        # Allows reading shapes on disk before the first restore.
        item_handlers={
            "model": ocp.StandardCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Returns False, because the caller decides when to save.

        Orbax would pass `step` to JAX, from its threads too. JAX then agrees on a point
        to stop that is not among the numbers of `processes.preemption_notice`.
        """
        return False


class _WithManifest:
    """Writes a checkpoint's manifest before the checkpoint gets its final name.

    Only the lead process finalizes. Orbax writes `NOT_LISTED` after the manifest.
    """

    async def finalize(self) -> None:
        await asyncio.to_thread(_write_manifest, self.get())  # pyright: ignore[reportAttributeAccessIssue]
        await super().finalize()  # pyright: ignore[reportAttributeAccessIssue]


class _OnDisk(_WithManifest, ocp.path.atomicity.AtomicRenameTemporaryPath):
    pass


class _InBucket(_WithManifest, ocp.path.atomicity.CommitFileTemporaryPath):
    pass


def _write_manifest(folder: epath.Path) -> None:
    path = at(os.fspath(folder))
    names = sizes_below(path).keys() - NOT_LISTED
    Manifest(describe_all(path, sorted(names))).save(path / manifest.NAME)


def start(
    manager: ocp.CheckpointManager, state: TrainState, record: Mapping[str, Any]
) -> None:
    """Starts a save; returns when the arrays have been copied to the host."""
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
    """Saves a state; returns when the checkpoint is on disk."""
    start(manager, state, record)
    manager.wait_until_finished()


def split(state: TrainState) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Splits a state into `model`, which evaluation needs, and `training`."""
    fields = {name: value for name, value in vars(state).items() if value is not None}
    model = {name: fields.pop(name) for name in _MODEL_FIELDS if name in fields}
    return model, fields


class _LastAndBest(managers.PreservationPolicy):
    """Keeps the checkpoints that `choose` picks: the last and the best."""

    def should_preserve(
        self,
        # `PolicyCheckpointInfo` is a protocol that cannot be checked at run time.
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
    (value,) = metrics.values()
    return value
