"""`InferenceOptions`: what is done to a run's model before it predicts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from jaxii.decoding.decoders import Decoders
from jaxii.evaluation.predictor import (
    Batches,
    Model,
    Predict,
    make_predict,
    shift_of,
    shifted,
)
from jaxii.evaluation.provenance import Provenance


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How predictions differ from those of the run's own model as it was trained.

    All of it needs images of the target at most, never labels.

    Attributes:
      ensemble: workdirs of other runs, whose probabilities are averaged with the run's.
      adapt_bn: BatchNorm uses the statistics of the images that are predicted.
      label_shift: probabilities are corrected for how often labels occur among them.
      allow_tuning_labels: let the ensemble have runs whose weights have learnt from
        labels of the target domain.
    """

    ensemble: tuple[str, ...] = ()
    adapt_bn: bool = False
    label_shift: bool = False
    allow_tuning_labels: bool = False

    @property
    def names(self) -> list[str]:
        """The options that are on, for the names of files."""
        on = {
            "ensemble": bool(self.ensemble),
            "adabn": self.adapt_bn,
            "label_shift": self.label_shift,
        }
        return [name for name, is_on in on.items() if is_on]

    def make_predict(
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
          target: gives `images` and `mask` of the target, in any order.
          decoders: whose calibration and label frequencies a shift of labels is
            measured from; None corrects none.
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
        """Returns the record with the images that the adaptations have seen.

        Args:
          record: of the checkpoints, their union.
          bn_images: splits whose images BatchNorm adapts to, if it does.
          shift_images: splits whose images a shift of labels is measured on.
        """
        if self.adapt_bn:
            record = record.with_("weights", images=bn_images)
        if self.label_shift:
            record = record.with_("calibration", images=shift_images)
        return record
