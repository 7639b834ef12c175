"""What is done to a run's model before it answers: averaged, adapted to images.

Comes between the opened checkpoint and `evaluate` or `predict`, which say on which
images it is to answer; all of it needs images of the target at most, never labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from jax.sharding import Mesh

from jaxii.console import say
from jaxii.data.prepared import Data
from jaxii.decoding.decoders import Decoders
from jaxii.errors import InputError
from jaxii.evaluation.predictor import (
    Batches,
    Model,
    Predict,
    make_predict,
    shift_of,
    shifted,
)
from jaxii.evaluation.provenance import Provenance
from jaxii.runs.trained import Trained, open_trained


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a result differs by from that of the run's own model as it was trained.

    Attributes:
      ensemble: workdirs of other runs, whose probabilities are averaged
        with the run's own.
      adapt_bn: BatchNorm's statistics are those of the images that are answered for.
      label_shift: probabilities are corrected for how often labels occur among them.
      allow_tuning_labels: average runs too whose weights have learnt from labels of
        the target domain.
    """

    ensemble: tuple[str, ...] = ()
    adapt_bn: bool = False
    label_shift: bool = False
    allow_tuning_labels: bool = False

    @property
    def names(self) -> list[str]:
        """What is done, for the names of files."""
        done = {
            "ensemble": bool(self.ensemble),
            "adabn": self.adapt_bn,
            "label_shift": self.label_shift,
        }
        return [name for name, is_done in done.items() if is_done]

    def open_others(
        self, own: Trained, label_hash: str, data: Data | None = None
    ) -> tuple[Trained, ...]:
        """Opens the other runs of the ensemble.

        Args:
          own: the run's own checkpoint.
          label_hash: content hash of its labels.
          data: that the ensemble is measured on; None for images of any folder.

        Raises:
          InputError: one that cannot be averaged with it, or may not be.
        """
        others = tuple(
            open_trained(name, label_hash=label_hash) for name in self.ensemble
        )
        for other in others:
            other.check_same_data(own.config)
            other.check_same_view(own.config)
            record = other.provenance if data is None else other.provenance_on(data)
            if record.weights.away("labels") and not self.allow_tuning_labels:
                raise InputError(
                    f"--ensemble: {other.name} has learnt from labels of the target "
                    f"domain ({record.badge()}); add --allow_tuning_labels if that is "
                    "meant."
                )
        return others

    def predict_on(
        self,
        models: Sequence[Model],
        mesh: Mesh,
        target: Callable[[], Batches],
        decoders: Decoders | None,
    ) -> Predict:
        """Returns the models' prediction, adapted to a target.

        Args:
          models: the run's own and those of the other runs.
          mesh: the devices.
          target: gives `images` and `mask` of the target, in no order.
          decoders: with the calibration and the frequencies at home that a shift of
            labels is measured from; None does not correct any.
        """
        if self.adapt_bn:
            models = [model.adapted(target(), mesh) for model in models]
        predict = make_predict(models, mesh)
        if not self.label_shift or decoders is None:
            return predict
        shift = shift_of(
            predict,
            target(),
            mesh,
            calibration=decoders.calibration,
            home=decoders.frequencies,
        )
        return shifted(predict, shift)

    def provenance(
        self, record: Provenance, bn_images: Sequence[str], shift_images: Sequence[str]
    ) -> Provenance:
        """Returns the record with what the adaptations have seen.

        Args:
          record: of the checkpoints, their union.
          bn_images: splits whose images BatchNorm adapts to, where it does.
          shift_images: splits whose images a shift of labels is measured on.
        """
        if self.adapt_bn:
            record = record.with_("weights", images=bn_images)
        if self.label_shift:
            record = record.with_("calibration", images=shift_images)
        return record


def union_of(members: Sequence[Trained], data: Data) -> Provenance:
    """Returns what influenced the weights and the choice of any of the checkpoints.

    Args:
      members: the checkpoints.
      data: that they are measured on.
    """
    return reduce(Provenance.union, [member.provenance_on(data) for member in members])


def say_first(record: Provenance) -> None:
    """Says what a reader of the figures has to know, before anything is computed."""
    for caveat in record.caveats():
        say(f"CAVEAT     {caveat}")
