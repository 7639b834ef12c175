"""What of a run is on disk, and how it gets there and back.

`WORKDIR/checkpoints/<stage>/<step>/` through Orbax, asynchronously: `model`
(parameters, their average, BatchNorm statistics: all that evaluation needs), `training`
(optimizer and counters) and `metadata` (JSON). A step's folder appears under its name
only when it is complete. Kept are the last checkpoint of a stage and its best.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers as managers

from jaxii.errors import InputError
from jaxii.files import at
from jaxii.train.stages import Saved, choose
from jaxii.train.state import TrainState, Tree

_MODEL_FIELDS = ("params", "batch_stats", "average_params")


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: folder of the run.
      stage_names: names of the run's stages, in order.
      label_hash: content hash of the vocabulary; checkpoints of another are refused.
    """

    def __init__(
        self, workdir: epath.PathLike, stage_names: Sequence[str], label_hash: str
    ):
        path = at(workdir)
        # Orbax wants absolute paths, and a bucket's are.
        path = path.resolve() if isinstance(path, Path) else path
        self.directory = epath.Path(path) / "checkpoints"
        self._stage_names = tuple(stage_names)
        self._label_hash = label_hash
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def saved(self) -> dict[str, list[Saved]]:
        """Returns stage name -> its complete checkpoints, by step.

        Raises:
          InputError: they were made with other labels.
        """
        self.wait()
        found = {}
        for name in self._stage_names:
            if (self.directory / name).exists():
                steps = sorted(self._manager(name).all_steps())
                found[name] = [self._describe(name, step) for step in steps]
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
            raise InputError(f"--stage={stage}; use one of {', '.join(trained)}.")
        return choose(found[stage or trained[-1]], "best")

    def metadata(self, saved: Saved) -> dict[str, Any]:
        """Returns the JSON that was saved with a checkpoint."""
        return self._record(saved.stage, saved.step)

    def save(
        self, saved: Saved, state: TrainState, metadata: Mapping[str, Any]
    ) -> None:
        """Starts to save; returns when the arrays have been copied from the devices.

        Args:
          saved: what this checkpoint says of itself.
          state: the state after `saved.step` updates.
          metadata: anything else to keep with it, as JSON.
        """
        model, training = _split(state)
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
        self._manager(saved.stage).save(
            saved.step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                metadata=ocp.args.JsonSave(record),
            ),
            metrics=None if saved.metric is None else {"metric": saved.metric},
            force=True,
        )

    def restore_state(self, saved: Saved, like: TrainState) -> TrainState:
        """Returns the whole state of a checkpoint, as and where `like` says.

        Args:
          saved: the checkpoint.
          like: shapes, dtypes and shardings of every leaf.
        """
        model, training = _split(like)
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
        """
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

    def wait(self) -> None:
        """Waits until everything that was started to be saved is on disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads."""
        for manager in self._managers.values():
            manager.close()
        self._managers.clear()

    def _describe(self, name: str, step: int) -> Saved:
        record = self._record(name, step)
        if record["label_hash"] != self._label_hash:
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
        path = self.directory / name / str(step) / "metadata" / "metadata"
        return json.loads(path.read_text())

    def _manager(self, name: str) -> ocp.CheckpointManager:
        if name not in self._managers:
            best = managers.BestN(
                get_metric_fn=_metric, n=1, keep_checkpoints_without_metrics=False
            )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(
                    [managers.LatestN(1), best]
                ),
                # Without it the metrics are not written, and a run that is resumed
                # forgets which checkpoint is its best.
                best_fn=_metric,
                cleanup_tmp_directories=True,
            )
            self._managers[name] = ocp.CheckpointManager(
                self.directory / name,
                options=options,
                # Named here, not found out at the first save or restore: until then
                # the shapes of what is on disk could not be asked for.
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "training": ocp.StandardCheckpointHandler(),
                    "metadata": ocp.JsonCheckpointHandler(),
                },
            )
        return self._managers[name]


def evaluated_params(model: Mapping[str, Tree]) -> Tree:
    """Returns the averaged parameters of a restored model where it has some."""
    # The second name is that of checkpoints of the first version.
    average = model.get("average_params", model.get("ema_params"))
    return model["params"] if average is None else average


def _metric(metrics: Mapping[str, float]) -> float:
    # The one figure that was saved, whatever the name it was saved by.
    (value,) = metrics.values()
    return value


def _split(state: TrainState) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Divides a state into what evaluation needs and what only training needs."""
    fields = {name: value for name, value in vars(state).items() if value is not None}
    model = {name: fields.pop(name) for name in _MODEL_FIELDS if name in fields}
    return model, fields
