"""`evaluate`: measures the best checkpoint of a stage on every split that has labels.

`train` calls `measure` when its last stage has ended. Figures, the report and the
submission are left in the workdir.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import jax
import numpy as np

from jaxii.console import say
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
from jaxii.runs import assembly, results
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.results import Measured
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.train.stages import Saved

AS_TRAINED = InferenceOptions()


def evaluate(
    workdir: Workdir,
    *,
    data_dir: str,
    stage: str,
    tune_on: str,
    decoder: str = "threshold",
    options: InferenceOptions = AS_TRAINED,
    verify: bool = False,
) -> None:
    """Measures a trained run again; nothing is trained."""
    with Run.open(workdir.path, stage, data_dir=data_dir, verify=verify) as run:
        measure(run, tune_on=tune_on, decoder=decoder, options=options)


def measure(
    run: Run,
    *,
    tune_on: str = "",
    decoder: str = "threshold",
    options: InferenceOptions = AS_TRAINED,
) -> EvaluationResult:
    """Measures the best checkpoint of a stage, writes figures, report and submission.

    Args:
      run: opened at the checkpoint.
      tune_on: the split that the decoders are fitted on; "" is the run's own choice.
      decoder: the one whose predictions count and are submitted; all are scored.
      options: what is done to the model before.
    """
    data = run.data
    tune_on = tune_on or data.choosing_split
    # Domains that other runs held out give a threshold; all else is chosen on images.
    by_runs = tune_on == "held_out" and not data.has_images("held_out")
    chooser = "validation" if by_runs else tune_on
    data.check_truth(chooser)
    members, saved = run.members(options, data), run.saved
    splits = dict.fromkeys((chooser, "validation", "held_out", "test"))
    splits = [split for split in splits if data.has_images(split)]
    provenance = _provenance(run, members, options, splits, (tune_on, chooser))
    for caveat in provenance.caveats():
        say(f"CAVEAT     {caveat}")
    passes = _Passes(run, members, options, chooser)
    sums = passes.sums(chooser)
    choice = choose(sums)
    if by_runs:
        choice = replace(choice, threshold=_threshold_of_runs(run, saved.stage))
    made = run.label_embedding
    vectors = None if made is None else made.vectors
    decoders = fit_decoders(sums, choice, label_embeddings=vectors)
    has_head = run.plan(saved.stage).stage.embedding_head and len(members) == 1
    names = decoders.names(has_head=has_head)
    decoders.check(decoder, names)
    scoring = _Scoring(run, passes, decoders, names, decoder)
    metrics, measured = scoring.score(splits, chooser, sums)
    in_use = DecoderInUse(name=decoder, chosen_on=tune_on, choice=choice)
    averaged = [member.name for member in members]
    result = _result(
        run, saved, metrics, in_use, chooser, provenance, options.names, averaged
    )
    if processes.is_lead():
        elsewhere = tune_on != data.choosing_split
        variants = [f"tuned_on_{tune_on}"] * elsewhere + options.names
        results.write(run, result, decoders, measured, variants, saved)
    processes.wait_for_all("results")
    for other in members[1:]:
        other.close()
    return result


class _Passes:
    """Passes of the evaluated models over whole splits.

    Args:
      run: opened at the checkpoint.
      members: the checkpoints whose probabilities are averaged.
      options: what is done to the models before.
      chooser: the split that the decoders are fitted on.
    """

    def __init__(
        self,
        run: Run,
        members: Sequence[Run],
        options: InferenceOptions,
        chooser: str,
    ):
        own, *others = members
        # The network of the plan: the prediction may have been compiled for it already.
        apply = run.plan(own.saved.stage).settings.apply
        self._models = [
            own.model(apply),
            *(other.model() for other in others),
        ]
        self._run, self._options, self._chooser = run, options, chooser
        self._evaluator = run.evaluator()

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
            verified_absent=self._run.verified_absent(split),
            on_batch=None if scores is None else scores.add,
        )

    def decode(
        self, split: str, decoders: Decoders, scores: DecoderScores, target: str
    ) -> None:
        """Lets `scores` take every batch of a split, by a model adapted to `target`."""
        predict = self._predict(target, decoders)
        self._evaluator.predict(predict, self._batches(split), scores.add)

    def _batches(self, split: str) -> Batches:
        return assembly.eval_batches(self._run.config, self._run.data, split)

    def _predict(self, target: str, decoders: Decoders | None) -> Predict:
        def images() -> Batches:
            source = self._run.data.split(target).source
            return assembly.unlabelled_batches(self._run.config, source)

        options = self._options if target != "validation" else AS_TRAINED
        # On the split that calibrated, labels occur as often as the decoders expect.
        home = decoders if target != self._chooser else None
        return options.make_predict(self._models, self._run.mesh, images, home)


@dataclass(frozen=True)
class _Scoring:
    """Measures splits with fitted decoders, one pass each."""

    run: Run
    passes: _Passes
    decoders: Decoders
    names: Sequence[str]
    in_use: str

    def score(
        self, splits: Sequence[str], chooser: str, chosen_sums: Accumulators
    ) -> tuple[dict[str, SplitMetrics], Measured]:
        """Returns the figures of each split that has labels, and the predictions.

        Args:
          splits: by name.
          chooser: the split that the decoders were fitted on.
          chosen_sums: of that split.
        """
        data = self.run.data
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
        data = self.run.data
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
        data = self.run.data
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
            num_summed=assembly.eval_batch_size(self.run.config),
        )


def _by_label(sums: Accumulators, scores: DecoderScores) -> SplitFigures:
    return split_figures(
        np.asarray(sums.sums.histogram),
        hits=scores.hits,
        predicted=scores.labels,
        support=np.bincount(scores.truth.label_ids, minlength=len(scores.hits)),
    )


def _provenance(
    run: Run,
    members: Sequence[Run],
    options: InferenceOptions,
    splits: Sequence[str],
    chosen_on: tuple[str, str],
) -> Provenance:
    """Returns what influences the figures.

    Args:
      run: opened at the checkpoint.
      members: the checkpoints.
      options: what is done to the models.
      splits: those that are measured.
      chosen_on: splits that choose the threshold, and everything else of the decoders.
    """
    tune_on, chooser = chosen_on
    adapted = [split for split in splits if split != "validation"]
    corrected = [split for split in adapted if split != chooser]
    record = options.provenance(_record_of(run, members, options), adapted, corrected)
    record = record.with_("thresholds", labels=[tune_on, chooser])
    return record.with_("calibration", labels=[chooser])


def _record_of(
    run: Run, members: Sequence[Run], options: InferenceOptions
) -> Provenance:
    """Returns what influenced the models, where they may be measured on these data.

    Raises:
      InputError: If the run has seen images that it is to be measured on, and nobody
        said that this is meant.
    """
    own = members[0]
    records = [member.provenance_on(run.data) for member in members]
    record, seen = reduce(Provenance.union, records), records[0]
    if seen.badge() != own.provenance.badge() and not options.allow_tuning_labels:
        raise InputError(
            f"{own.name} has learnt from images of {run.data.directory} that it is "
            f"to be measured on ({seen.badge()}); add --allow_tuning_labels if that is "
            "meant."
        )
    return record


def _threshold_of_runs(run: Run, stage: str) -> float:
    found = _held_out(run, stage)
    if found:
        return pool(found).threshold
    raise InputError(
        f"{run.workdir.path} has not been trained without each of the domains "
        f"{', '.join(run.data.domains)} and evaluated at its stage {stage}; run "
        "hold_out with the same --workdir first."
    )


def _estimates(
    run: Run, saved: Saved, metrics: dict[str, SplitMetrics]
) -> DomainShiftEstimate | None:
    """Returns estimates of F2 on new domains, where the test can tell how good."""
    held_out = _held_out(run, saved.stage)
    if "held_out" in metrics:
        held_out = {run.config.data.held_out_domain: metrics["held_out"]}
    if not held_out or "test" not in metrics:
        return None
    return estimate(metrics["validation"], held_out, metrics["test"])


def _held_out(run: Run, stage: str) -> dict[str, SplitMetrics]:
    found = run.held_out_figures(stage)
    return {name: SplitMetrics.from_json(record) for name, record in found.items()}


def _result(
    run: Run,
    saved: Saved,
    metrics: dict[str, SplitMetrics],
    decoder: DecoderInUse,
    chooser: str,
    provenance: Provenance,
    variant: Sequence[str],
    members: Sequence[str],
) -> EvaluationResult:
    config, data = run.config, run.data
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
        num_params=_num_params(run, saved),
        provenance=provenance,
        decoder=decoder,
        constant=_constant(data, list(metrics), chooser),
        splits=metrics,
        estimates=_estimates(run, saved, metrics),
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


def _num_params(run: Run, saved: Saved) -> int:
    plan = run.plan(saved.stage)
    params, _ = jax.eval_shape(plan.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))
