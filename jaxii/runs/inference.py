"""`InferenceOptions`: changes to a run's model before it predicts."""

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
    """Differences of the predictions from those of the run's model as trained.

    The options need at most images of the target, never labels.

    Attributes:
      ensemble: Workdirs of other runs, whose probabilities are averaged with the run's.
      adapt_bn: Whether BatchNorm uses the statistics of the predicted images.
      label_shift: Whether to correct for the label frequencies of the predicted images.
      allow_tuning_labels: Whether weights may have learnt from labels of the target
        domain.
    """

    ensemble: tuple[str, ...] = ()
    adapt_bn: bool = False
    label_shift: bool = False
    allow_tuning_labels: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the options that are on, for file names."""
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
          models: The run's model and those of the other runs.
          mesh: The devices.
          target: Returns batches of `images` and `mask` of the target, in any order.
          decoders: Decoders whose calibration and label frequencies are the reference
            for label shift; None does not correct it.
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
        """Returns the record with the images that the adaptations use.

        Args:
          record: Union of the checkpoints' records.
          bn_images: Splits whose images `adapt_bn` uses.
          shift_images: Splits whose images `label_shift` uses.
        """
        if self.adapt_bn:
            record = record.with_("weights", images=bn_images)
        if self.label_shift:
            record = record.with_("calibration", images=shift_images)
        return record
