"""A run that has been trained, opened at one checkpoint, without its data.

What another run starts from (`start_from`), what an ensemble averages, and what
`predict` applies to images of any folder.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh, Sharding

from jaxii.config import Config, ModelConfig
from jaxii.data.prepared import Data
from jaxii.data.seen import SeenImages
from jaxii.distributed.mesh import replicated
from jaxii.errors import InputError
from jaxii.evaluation.predictor import Model
from jaxii.evaluation.provenance import HOME_SPLITS, Provenance
from jaxii.models.multitask import EMBEDDING_HEAD
from jaxii.runs.networks import Networks
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, at
from jaxii.train.checkpoint import Checkpoints, evaluated_params
from jaxii.train.initial_weights import inherit
from jaxii.train.stages import Saved
from jaxii.train.state import Tree

# What decides which images train and which are held out.
DATA_FIELDS = ("dataset", "labels_file", "validation_fraction", "held_out_domain")
# What decides which pixels of an image are seen.
VIEW_FIELDS = ("image_size_pixels", "central_share")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A workdir and one of its checkpoints.

    Attributes:
      workdir: of the run.
      config: of the run.
      checkpoints: of the run.
      saved: the checkpoint.
    """

    workdir: Workdir
    config: Config
    checkpoints: Checkpoints
    saved: Saved

    @property
    def name(self) -> str:
        """The checkpoint in words."""
        return (
            f"step {self.saved.step} of stage {self.saved.stage} of {self.workdir.path}"
        )

    @property
    def provenance(self) -> Provenance:
        """What influenced the weights and the choice of this checkpoint."""
        return Provenance.from_json(self.checkpoints.metadata(self.saved)["provenance"])

    @property
    def data_hash(self) -> str:
        """Content hash of the dataset that the run was trained on."""
        return self.checkpoints.metadata(self.saved)["data_hash"]

    def provenance_on(self, data: Data) -> Provenance:
        """Returns the record for a result on a dataset, perhaps of other images.

        Where that is not the one that the run was trained on, images of its test and
        tuning splits that the run has seen, by their ids, influenced what they did.

        Raises:
          InputError: If the run was trained on images that are held out in the dataset
            to choose thresholds.
        """
        record = self.provenance
        if self.data_hash == data.content_hash:
            return record
        seen = SeenImages.load(self.workdir.seen_file)
        for name in ("validation", "held_out", "tuning", "test"):
            if not data.has_images(name):
                continue
            counts = seen.count(data.split(name).index.image_ids)
            if name not in HOME_SPLITS:
                for part in counts:
                    record = record.with_(part, labels=[name])
            elif "weights" in counts:
                raise InputError(
                    f"{self.name} was trained on {counts['weights']} of the "
                    f"{data.split(name).num_examples} images of split {name} of "
                    f"{data.directory}, so that thresholds would be chosen on images "
                    "it knows; use the dataset it was trained on, or one with other "
                    "images."
                )
        return record

    def model(self, mesh: Mesh, apply: Callable[..., Any] | None = None) -> Model:
        """Returns the network and what it is evaluated with.

        Args:
          mesh: the devices.
          apply: the network, where it has been made already.
        """
        restored = self.restored(replicated(mesh))
        params = evaluated_params(restored)
        if apply is None:
            apply = self._network(params)
        return Model(apply=apply, params=params, batch_stats=restored["batch_stats"])

    def in_float32(self, model: Model, *, portable: bool = False) -> Model:
        """Returns a restored model that computes in float32, whatever the run does.

        Args:
          model: of this checkpoint.
          portable: without the embedding head, and in the forms that suit no platform
            in particular.
        """
        params = dict(model.params)
        if portable:
            params.pop(EMBEDDING_HEAD, None)
        apply = self._network(
            params, compute_dtype="float32", platform="any" if portable else None
        )
        return replace(model, apply=apply, params=params)

    def _network(
        self, params: Tree, *, platform: str | None = None, **changes: str
    ) -> Callable[..., Any]:
        head = params.get(EMBEDDING_HEAD)
        config = replace(self.config.model, **changes)
        num_classes = len(self.workdir.vocabulary())
        embedding_dim = 0 if head is None else len(head["bias"])
        return _apply(config, num_classes, embedding_dim, platform)

    def restored(self, sharding: Sharding) -> dict[str, Tree]:
        """Returns parameters, their average and statistics, laid out as asked."""
        return self.checkpoints.restore_model(self.saved, sharding)

    def check_evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Refuses figures of another checkpoint: their decoders do not fit this one.

        Args:
          metrics: what `evaluate` left, with the decoders that it fitted.

        Raises:
          InputError: they are those of another step or stage.
        """
        stage, step = self.saved.stage, self.saved.step
        if (stage, step) != (metrics["stage"], metrics["step"]):
            raise InputError(
                f"the thresholds and the calibration of {self.workdir.path} were "
                f"fitted on step {metrics['step']} of stage {metrics['stage']}, and "
                f"the checkpoint to use is step {step} of stage {stage}; run evaluate "
                f"--workdir={self.workdir.path} --stage={stage} again first."
            )

    def check_start_of(self, like: Tree) -> None:
        """Refuses to be the start of a network that it does not fit.

        Args:
          like: shapes of the parameters that are to start from here.

        Raises:
          InputError: another shape, or a head that is wanted and not there.
        """
        inherit(self.checkpoints.model_shapes(self.saved), like, self.name)

    def check_same_view(self, config: Config) -> None:
        """Refuses a run that sees other pixels of an image than a configuration says.

        Raises:
          InputError: the field that differs.
        """
        self._check_same(config, VIEW_FIELDS, "; average runs that see an image alike.")

    def check_same_data(self, config: Config) -> None:
        """Refuses a run whose training images are not those of a configuration.

        Raises:
          InputError: the field that differs.
        """
        self._check_same(
            config,
            DATA_FIELDS,
            ", so that what one holds out the other may have trained on; use a run on "
            "the same data.",
        )

    def close(self) -> None:
        """Lets go of the checkpoints."""
        self.checkpoints.close()

    def _check_same(self, config: Config, names: tuple[str, ...], so: str) -> None:
        for name in names:
            theirs, ours = getattr(self.config.data, name), getattr(config.data, name)
            if theirs != ours:
                raise InputError(
                    f"{self.workdir.path} has data.{name}={theirs!r} and this run "
                    f"{ours!r}{so}"
                )


@functools.cache
def _apply(
    config: ModelConfig, num_classes: int, embedding_dim: int, platform: str | None
) -> Callable[..., Any]:
    """Makes one network for all runs that have the same, as seeds do."""
    networks = Networks(
        config=config,
        num_classes=num_classes,
        embedding_dim=embedding_dim,
        platform=platform,
    )
    return networks.get(embedding_dim > 0).apply


def open_trained(
    path: AnyPath | str, stage: str = "", *, label_hash: str = ""
) -> Trained:
    """Opens a run at the best checkpoint of a stage.

    Args:
      path: workdir of the run.
      stage: by name; "" for the last one that has been trained.
      label_hash: content hash of the labels that the run has to have; "" for any.

    Raises:
      InputError: no run is there, it was not trained, or it has other labels.
    """
    workdir = Workdir(at(path))
    config, found = workdir.config(), workdir.vocabulary().content_hash()
    if label_hash and found != label_hash:
        raise InputError(
            f"{path} was trained on labels {found}, and here the labels are "
            f"{label_hash}; use a run on the same labels in the same order."
        )
    names = [stage.name for stage in config.stages]
    # That the labels are the checkpoint's is checked with its other files.
    checkpoints = Checkpoints(workdir.path, names, "", read_only=True)
    saved = checkpoints.best_of(stage)
    workdir.check_belongs(checkpoints.metadata(saved))
    return Trained(workdir=workdir, config=config, checkpoints=checkpoints, saved=saved)
