"""`evaluate`: measures the best checkpoint of a stage on every split that has labels.

`train` calls `measure` when its last stage has ended. Figures, the report and the
submission are left in the workdir.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxii.data import folder
from jaxii.data.prepared import Data
from jaxii.decoding.constant import best_constant, constant_f2
from jaxii.decoding.decoders import Decoders, fit_decoders
from jaxii.decoding.thresholds import choose
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation.by_label import SplitFigures, split_figures
from jaxii.evaluation.decoder_scores import DecoderScores, SplitTruth
from jaxii.evaluation.domain_shift import estimate, pool
from jaxii.evaluation.evaluator import split_metrics
from jaxii.evaluation.predictor import Batches, Predict
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import (
    Constant,
    DecoderInUse,
    DomainShiftEstimate,
    EvaluationResult,
    SplitMetrics,
    hardware,
)
from jaxii.metrics.streaming import Accumulators
from jaxii.runs import assemble, results
from jaxii.runs.results import Measured
from jaxii.runs.scoring import Variant, say_first, union_of
from jaxii.runs.session import Session, open_session
from jaxii.runs.trained import Trained
from jaxii.runs.workdir import Workdir
from jaxii.train.stages import Saved

AS_TRAINED = Variant()


def evaluate(
    workdir: Workdir,
    *,
    data_dir: str,
    stage: str,
    tune_on: str,
    decoder: str = "threshold",
    variant: Variant = AS_TRAINED,
    verify: bool = False,
) -> None:
    """Measures a trained run again; nothing is trained."""
    config = workdir.config().moved(data_dir)
    session = open_session(config, workdir, claim=False, verify=verify)
    measure(session, stage=stage, tune_on=tune_on, decoder=decoder, variant=variant)
    session.checkpoints.close()


def measure(
    session: Session,
    *,
    stage: str = "",
    tune_on: str = "",
    decoder: str = "threshold",
    variant: Variant = AS_TRAINED,
) -> EvaluationResult:
    """Measures the best checkpoint of a stage, writes figures, report and submission.

    Args:
      session: of the run.
      stage: name; "" is the last one trained.
      tune_on: the split that the decoders are fitted on; "" is the run's own choice.
      decoder: the one whose predictions count and are submitted; all are scored.
      variant: what is done to the model before.
    """
    data = session.data
    tune_on = tune_on or data.choosing_split
    # Domains that other runs held out give a threshold; all else is chosen on images.
    by_runs = tune_on == "held_out" and not data.has_images("held_out")
    chooser = "validation" if by_runs else tune_on
    data.check_truth(chooser)
    saved = session.checkpoints.best_of(stage)
    members = _members(session, saved, variant)
    splits = dict.fromkeys((chooser, "validation", "held_out", "test"))
    splits = [split for split in splits if data.has_images(split)]
    provenance = _provenance(session, members, variant, splits, (tune_on, chooser))
    say_first(provenance)
    passes = _Passes(session, members, variant, chooser)
    sums = passes.sums(chooser)
    choice = choose(sums)
    if by_runs:
        choice = replace(choice, threshold=_threshold_of_runs(session, saved.stage))
    made = session.label_embedding
    vectors = None if made is None else made.vectors
    decoders = fit_decoders(sums, choice, label_embeddings=vectors)
    has_head = session.plan(saved.stage).stage.embedding_head and len(members) == 1
    names = decoders.names(has_head=has_head)
    decoders.check(decoder, names)
    scoring = _Scoring(session, passes, decoders, names, decoder)
    metrics, measured = scoring.run(splits, chooser, sums)
    in_use = DecoderInUse(name=decoder, chosen_on=tune_on, choice=choice)
    averaged = [member.name for member in members]
    result = _result(
        session, saved, metrics, in_use, chooser, provenance, variant.names, averaged
    )
    if processes.is_lead():
        elsewhere = tune_on != data.choosing_split
        variants = [f"tuned_on_{tune_on}"] * elsewhere + variant.names
        results.write(session, result, decoders, measured, variants, saved)
    processes.wait_for_all("results")
    for other in members[1:]:
        other.close()
    return result


class _Passes:
    """Passes of the evaluated models over whole splits.

    Args:
      session: of the run.
      members: the checkpoints whose probabilities are averaged.
      variant: what is done to the models before.
      chooser: the split that the decoders are fitted on.
    """

    def __init__(
        self,
        session: Session,
        members: Sequence[Trained],
        variant: Variant,
        chooser: str,
    ):
        own, *others = members
        # The network of the plan: the prediction may have been compiled for it already.
        apply = session.plan(own.saved.stage).settings.apply
        self._models = [
            own.model(session.mesh, apply),
            *(other.model(session.mesh) for other in others),
        ]
        self._session, self._variant, self._chooser = session, variant, chooser
        self._evaluator = session.evaluator()

    def sums(
        self,
        split: str,
        decoders: Decoders | None = None,
        scores: DecoderScores | None = None,
    ) -> Accumulators:
        """Returns the sums of a split; `scores` takes every batch."""
        return self._evaluator.run(
            self._predict(split, decoders),
            self._batches(split),
            verified_absent=self._session.verified_absent(split),
            on_batch=None if scores is None else scores.add,
        )

    def decode(
        self, split: str, decoders: Decoders, scores: DecoderScores, target: str
    ) -> None:
        """Lets `scores` take every batch of a split, by a model adapted to `target`."""
        predict = self._predict(target, decoders)
        self._evaluator.predict(predict, self._batches(split), scores.add)

    def _batches(self, split: str) -> Batches:
        return assemble.eval_batches(self._session.config, self._session.data, split)

    def _predict(self, target: str, decoders: Decoders | None) -> Predict:
        def images() -> Batches:
            source = self._session.data.split(target).source
            return assemble.unlabelled_batches(self._session.config, source)

        variant = self._variant if target != "validation" else AS_TRAINED
        # On the split that calibrated, labels occur as often as the decoders expect.
        home = decoders if target != self._chooser else None
        return variant.predict_on(self._models, self._session.mesh, images, home)


@dataclass(frozen=True)
class _Scoring:
    """Measures splits with fitted decoders, one pass each."""

    session: Session
    passes: _Passes
    decoders: Decoders
    names: Sequence[str]
    in_use: str

    def run(
        self, splits: Sequence[str], chooser: str, chosen_sums: Accumulators
    ) -> tuple[dict[str, SplitMetrics], Measured]:
        """Returns the figures of each split that has labels, and the predictions.

        Args:
          splits: by name.
          chooser: the split that the decoders were fitted on.
          chosen_sums: of that split.
        """
        data = self.session.data
        metrics: dict[str, SplitMetrics] = {}
        scored: dict[str, DecoderScores] = {}
        labels: dict[str, SplitFigures] = {}
        submitted: dict[str, np.ndarray] = {}
        for split in splits:
            scores = self._scores(split)
            if split == chooser:
                sums = chosen_sums
                self.passes.decode(split, self.decoders, scores, target=split)
            else:
                sums = self.passes.sums(split, self.decoders, scores)
            scores.add_processes()
            if split == "test":
                image_ids = data.split(split).index.image_ids
                submitted |= zip(image_ids, scores.predictions, strict=True)
            # A test whose labels nobody has is predicted, and not scored.
            if data.has_truth(split):
                metrics[split] = split_metrics(
                    sums,
                    scores,
                    in_use=self.in_use,
                    threshold=self.decoders.choice.threshold,
                )
                scored[split], labels[split] = scores, _by_label(sums, scores)
        if submitted:
            submitted |= self._predict_tuning()
        measured = Measured(scores=scored, labels=labels, submitted=submitted)
        return metrics, measured

    def _predict_tuning(self) -> dict[str, np.ndarray]:
        """Returns predictions for tuning images that the submission has rows for.

        The model is the one that predicts the test: it adapts to images of the test.
        """
        data = self.session.data
        if not data.has_images("tuning"):
            return {}
        image_ids = data.split("tuning").index.image_ids
        if set(image_ids).isdisjoint(data.submission_ids):
            return {}
        scores = self._scores("tuning", is_scored=False)
        self.passes.decode("tuning", self.decoders, scores, target="test")
        scores.add_processes()
        return dict(zip(image_ids, scores.predictions, strict=True))

    def _scores(self, split: str, *, is_scored: bool = True) -> DecoderScores:
        data = self.session.data
        verified, index = data.verified_rows(split), data.split(split).index
        offsets, label_ids = verified.present()
        truth = SplitTruth(
            offsets=offsets,
            label_ids=label_ids,
            scored=verified.scored() & is_scored,
            slice_ids=index.slice_ids,
            slices=data.slices,
            groups=index.groups,
        )
        return DecoderScores(
            self.decoders,
            self.names,
            in_use=self.in_use,
            truth=truth,
            num_summed=assemble.eval_batch_size(self.session.config),
        )


def _by_label(sums: Accumulators, scores: DecoderScores) -> SplitFigures:
    return split_figures(
        np.asarray(sums.sums.histogram),
        hits=scores.hits,
        predicted=scores.labels,
        support=np.bincount(scores.truth.label_ids, minlength=len(scores.hits)),
    )


def _members(session: Session, saved: Saved, variant: Variant) -> tuple[Trained, ...]:
    """Returns the checkpoint, and after it those of the other runs of an ensemble."""
    own = Trained(
        workdir=session.workdir,
        config=session.config,
        checkpoints=session.checkpoints,
        saved=saved,
    )
    label_hash = session.data.vocabulary.content_hash()
    return own, *variant.open_others(own, label_hash, session.data)


def _provenance(
    session: Session,
    members: Sequence[Trained],
    variant: Variant,
    splits: Sequence[str],
    chosen_on: tuple[str, str],
) -> Provenance:
    """Returns what influences the figures.

    Args:
      session: of the run.
      members: the checkpoints.
      variant: what is done to the models.
      splits: those that are measured.
      chosen_on: splits that choose the threshold, and everything else of the decoders.
    """
    tune_on, chooser = chosen_on
    adapted = [split for split in splits if split != "validation"]
    corrected = [split for split in adapted if split != chooser]
    record = variant.provenance(
        _record_of(session, members, variant), adapted, corrected
    )
    record = record.with_("thresholds", labels=[tune_on, chooser])
    return record.with_("calibration", labels=[chooser])


def _record_of(
    session: Session, members: Sequence[Trained], variant: Variant
) -> Provenance:
    """Returns what influenced the models, where they may be measured on these data.

    Raises:
      InputError: If the run has seen images that it is to be measured on, and nobody
        said that this is meant.
    """
    record, own = union_of(members, session.data), members[0]
    seen = own.provenance_on(session.data)
    if seen.badge() != own.provenance.badge() and not variant.allow_tuning_labels:
        raise InputError(
            f"{own.name} has learnt from images of {session.data.directory} that it is "
            f"to be measured on ({seen.badge()}); add --allow_tuning_labels if that is "
            "meant."
        )
    return record


def _threshold_of_runs(session: Session, stage: str) -> float:
    found = _held_out(session, stage)
    if found:
        return pool(found).threshold
    raise InputError(
        f"{session.workdir.path} has not been trained without each of the domains "
        f"{', '.join(session.data.domains)} and evaluated at its stage {stage}; run "
        "hold_out with the same --workdir first."
    )


def _estimates(
    session: Session, saved: Saved, metrics: dict[str, SplitMetrics]
) -> DomainShiftEstimate | None:
    """Returns estimates of F2 on new domains, where the test can tell how good."""
    held_out = _held_out(session, saved.stage)
    if "held_out" in metrics:
        held_out = {session.config.data.held_out_domain: metrics["held_out"]}
    if not held_out or "test" not in metrics:
        return None
    return estimate(metrics["validation"], held_out, metrics["test"])


def _held_out(session: Session, stage: str) -> dict[str, SplitMetrics]:
    found = session.held_out_figures(stage)
    return {name: SplitMetrics.from_json(record) for name, record in found.items()}


def _result(
    session: Session,
    saved: Saved,
    metrics: dict[str, SplitMetrics],
    decoder: DecoderInUse,
    chooser: str,
    provenance: Provenance,
    variant: Sequence[str],
    members: Sequence[str],
) -> EvaluationResult:
    config, data = session.config, session.data
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return EvaluationResult(
        stage=saved.stage,
        step=saved.step,
        created=created,
        hardware=hardware(),
        seed=config.seed,
        dataset=f"{config.data.dataset} ({data.directory.name})",
        config_hash=config.content_hash(),
        label_hash=data.vocabulary.content_hash(),
        data_hash=data.content_hash,
        short_side_pixels=folder.short_side(data.directory),
        num_params=_num_params(session, saved),
        provenance=provenance,
        decoder=decoder,
        constant=_constant(data, list(metrics), chooser),
        splits=metrics,
        estimates=_estimates(session, saved, metrics),
        variant=variant,
        members=members,
    )


def _constant(data: Data, splits: Sequence[str], chooser: str) -> Constant:
    """Returns the best constant prediction, its length chosen on `chooser`."""
    num_classes = len(data.vocabulary)
    counts = data.train_rows.class_counts(num_classes)
    truth = {
        split: data.verified_rows(split).of_scored().present()
        for split in {*splits, chooser}
    }
    label_ids, _ = best_constant(counts, *truth[chooser])
    return Constant(
        labels=[data.vocabulary.codes[i] for i in label_ids],
        names=data.vocabulary.names(label_ids.tolist()),
        f2={s: constant_f2(label_ids, num_classes, *truth[s]) for s in splits},
    )


def _num_params(session: Session, saved: Saved) -> int:
    plan = session.plan(saved.stage)
    params, _ = jax.eval_shape(plan.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))
