"""Measures the best checkpoint of a stage on every split with labels.

`train` calls `measure` after its last stage.
"""

import datetime
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce

import jax
import numpy as np

from jaxii.console import OnProgress, no_progress, progress, say
from jaxii.data import folder
from jaxii.data.prepared import WITHOUT_RECURRING, Data
from jaxii.data.seen import hashes_of
from jaxii.decoding.constant import best_constant, constant_f2
from jaxii.decoding.decoders import NAMES, Decoders, fit_decoders
from jaxii.decoding.thresholds import choose
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation.by_label import SplitFigures, split_figures
from jaxii.evaluation.decoder_scores import DecoderScores, SplitTruth
from jaxii.evaluation.domain_shift import estimate
from jaxii.evaluation.evaluator import Evaluator, split_metrics
from jaxii.evaluation.held_out import HeldOut, Predictions, expected_f2_offsets
from jaxii.evaluation.predictor import Batches, Model, Predict
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
from jaxii.runs import assembly, results, unseen
from jaxii.runs.agreement import check_same_data, check_same_runs
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.results import Measured
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.train.trainer import Preempted

AS_TRAINED = InferenceOptions()


def evaluate(
    workdir: Workdir,
    *,
    data_dir: str,
    stage: str,
    tune_on: str,
    decoder: str = NAMES[0],
    options: InferenceOptions = AS_TRAINED,
    verify: bool = False,
) -> None:
    """Measures a trained run; see `measure`."""
    with Run.open(workdir.path, stage, data_dir=data_dir, verify=verify) as run:
        run.workdir.check_writable()
        measure(run, tune_on=tune_on, decoder=decoder, options=options)


def measure(
    run: Run,
    *,
    tune_on: str = "",
    decoder: str = NAMES[0],
    options: InferenceOptions = AS_TRAINED,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> EvaluationResult:
    """Measures a checkpoint and writes figures, report and submission to the workdir.

    Args:
      run: The run, opened at the checkpoint.
      tune_on: Split to fit the decoders on; "" for the one that chose checkpoints.
      decoder: The decoder whose predictions are the result; all decoders are scored.
      options: Changes to the model.
      should_stop: Called with the step after every batch; returns whether to stop.

    Raises:
      Preempted: If `should_stop` returned True; nothing was written.
    """
    data = run.data
    members, named = _members(run, options)
    tune_on = tune_on or data.choosing_split
    by_runs = tune_on == "held_out" and not data.has_images("held_out")
    pooled, record = unseen.read(run, pooled=by_runs)
    # Choices that need embeddings or only the truth are made on images of this run.
    chooser = "validation" if by_runs else tune_on
    data.check_truth(chooser)
    splits = _splits(data, chooser)
    trained = _trained(run, members, options)
    provenance = _provenance(trained, options, splits, tune_on, chooser)
    unseen.say_caveats(
        provenance, record, options, decoder, run.workdir.path, len(data.domains)
    )
    _say_copies(run, by_runs=by_runs)
    run, splits = _without_recurring(run, splits, trained)
    variants = run.workdir.tuned_on(tune_on) + options.names
    with _progress(should_stop, run.saved.step) as on_progress:
        passes = _passes(run, members, options, chooser, on_progress)
        decoders, metrics, measured = _fit_and_score(passes, splits, decoder, pooled)
        if run.config.data.held_out_domain in data.domains and not variants:
            own, record = unseen.predict_held_out(run, passes.models[0], on_progress)
            measured = replace(measured, held_out=own)
    result = _result(
        run,
        metrics=metrics,
        decoder=DecoderInUse(name=decoder, chosen_on=tune_on, choice=decoders.choice),
        constant=_constant(run.data, list(metrics), chooser),
        provenance=provenance,
        held_out=record,
        variant=options.names,
        members=named,
        recurring=_recurring(run.data, metrics, trained),
    )
    if processes.is_lead():
        results.write(run, result, decoders, measured, variants)
    processes.wait_for_all("results")
    for other in members[1:]:
        other.close()
    return result


@contextmanager
def _progress(
    should_stop: Callable[[int], bool], step: int
) -> Generator[OnProgress, None, None]:
    """Yields a callback that shows progress and raises `Preempted` if asked to stop."""

    def advance(done: int, total: int, what: str) -> None:
        show(done, total, what)
        if should_stop(step):
            raise Preempted("training is complete, but the evaluation was stopped")

    with progress() as show:
        yield advance


def _members(
    run: Run, options: InferenceOptions
) -> tuple[Sequence[Run], Sequence[tuple[str, str]]]:
    """Opens the runs to average; checks that all processes read the same files.

    Returns:
      The runs, and the name and content hash of each one's checkpoint.
    """
    members = run.members(options, run.data)
    check_same_runs(members)
    check_same_data([run])
    return members, [(member.name, member.checkpoint_hash) for member in members]


def _splits(data: Data, chooser: str) -> list[str]:
    """Returns the splits to predict, the one that fits the decoders first."""
    splits = dict.fromkeys((chooser, "validation", "held_out", "test"))
    return [split for split in splits if data.has_images(split)]


def _fit(run: Run, sums: Accumulators, pooled: Sequence[Predictions]) -> Decoders:
    """Fits the decoders on the pooled domains, or else on the split of `sums`."""
    sums = unseen.ranked(pooled, sums) if pooled else sums
    made = run.label_embedding
    vectors = None if made is None else made.vectors
    return fit_decoders(sums, choose(sums), label_embeddings=vectors)


def _with_offsets(
    decoders: Decoders, scores: DecoderScores, pooled: Sequence[Predictions]
) -> Decoders:
    """Adds the offsets measured on the images of the fit."""
    offsets = scores.expected_f2_offsets()
    if pooled:
        offsets |= expected_f2_offsets(decoders, pooled)
    return replace(decoders, expected_f2_offsets=offsets)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of the models over whole splits.

    Attributes:
      models: The models, whose probabilities are averaged.
      chooser: Split that the decoders are fitted on; "" if they were fitted before.
      evaluator: Sums the figures.
      global_batch_size: Images in a batch.
      on_progress: Called with (images done, images in all, pass).
    """

    run: Run
    models: Sequence[Model]
    options: InferenceOptions
    chooser: str
    evaluator: Evaluator
    global_batch_size: int
    on_progress: OnProgress = no_progress

    def sums(
        self,
        split: str,
        decoders: Decoders | None = None,
        scores: DecoderScores | None = None,
    ) -> Accumulators:
        """Returns the sums of a split and adds every batch to `scores`."""
        return self.evaluator.run(
            self._predict(split, decoders),
            self._batches(split, split if scores else f"fit on {split}"),
            verified_absent=self.run.data.verified_absent(split),
            on_batch=None if scores is None else scores.add,
        )

    def decode(
        self, split: str, decoders: Decoders, scores: DecoderScores, target: str
    ) -> None:
        """Adds every batch of a split to `scores`, by models adapted to `target`."""
        predict = self._predict(target, decoders)
        self.evaluator.predict(predict, self._batches(split, split), scores.add)

    def _batches(self, split: str, what: str) -> Batches:
        size = self.global_batch_size
        batches = assembly.eval_batches(
            self.run.config, self.run.data, split, global_batch_size=size
        )
        return self._counted(batches, split, what, size)

    def _counted(self, batches: Batches, split: str, what: str, size: int) -> Batches:
        """Yields the batches of a split and reports each when the next is needed."""
        num_images = self.run.data.split(split).num_examples
        for done, batch in enumerate(batches, 1):
            yield batch
            self.on_progress(min(done * size, num_images), num_images, what)

    def _predict(self, target: str, decoders: Decoders | None) -> Predict:
        # Models adapt to all images of the split, near copies included.
        target = target.removesuffix(WITHOUT_RECURRING)

        def images() -> Batches:
            source = self.run.data.split(target).source
            batches = assembly.unlabelled_batches(self.run.config, source)
            size = assembly.eval_batch_size(self.run.config)
            return self._counted(batches, target, f"adapt to {target}", size)

        options = self.options if target != "validation" else AS_TRAINED
        # On the calibration's own split, label frequencies are as the decoders expect.
        home = decoders if target != self.chooser else None
        return options.make_predict(self.models, self.run.mesh, images, home)


def _passes(
    run: Run,
    members: Sequence[Run],
    options: InferenceOptions,
    chooser: str,
    on_progress: OnProgress,
) -> Passes:
    return Passes(
        run=run,
        models=[member.model() for member in members],
        options=options,
        chooser=chooser,
        evaluator=run.evaluator(),
        global_batch_size=assembly.eval_batch_size(run.config),
        on_progress=on_progress,
    )


def _fit_and_score(
    passes: Passes, splits: Sequence[str], decoder: str, pooled: Sequence[Predictions]
) -> tuple[Decoders, dict[str, SplitMetrics], Measured]:
    """Fits the decoders and measures the splits with them."""
    run, chooser = passes.run, passes.chooser
    sums = passes.sums(chooser)
    decoders = _fit(run, sums, pooled)
    has_head = run.plan(run.saved.stage).stage.embedding_head
    names = decoders.names(has_head=has_head and len(passes.models) == 1)
    decoders.check(decoder, names)
    scoring = Scoring(run, passes, decoders, names, decoder)
    metrics, measured = scoring.score(splits, chooser, sums)
    pooled_ids = itertools.chain(*(images.image_ids for images in pooled))
    fitted_on = hashes_of([run.data.split(chooser).index], pooled_ids)
    measured = replace(measured, fitted_on=fitted_on)
    return _with_offsets(decoders, measured.scores[chooser], pooled), metrics, measured


@dataclass(frozen=True)
class Scoring:
    """Measures splits with fitted decoders, one pass each.

    Attributes:
      names: The decoders to score.
      in_use: The decoder whose predictions are the result.
    """

    run: Run
    passes: Passes
    decoders: Decoders
    names: Sequence[str]
    in_use: str

    def score(
        self, splits: Sequence[str], chooser: str, chosen_sums: Accumulators
    ) -> tuple[dict[str, SplitMetrics], Measured]:
        """Returns the figures of each split with labels, and the predictions.

        Args:
          chooser: Split that the decoders were fitted on.
          chosen_sums: Sums of `chooser`.
        """
        data = self.run.data
        metrics: dict[str, SplitMetrics] = {}
        scored: dict[str, DecoderScores] = {}
        labels: dict[str, SplitFigures] = {}
        submitted: dict[str, np.ndarray] = {}
        for split in splits:
            sums, scores = self.sums(split, chosen_sums if split == chooser else None)
            if split == "test":
                image_ids = data.split(split).index.image_ids
                submitted |= zip(image_ids, scores.predictions, strict=True)
            # A test without labels is predicted but not scored.
            if data.has_truth(split):
                metrics[split], labels[split] = self.figures(sums, scores)
                scored[split] = scores
        if submitted:
            submitted |= self._predict_tuning()
        measured = Measured(scores=scored, labels=labels, submitted=submitted)
        return metrics, measured

    def sums(
        self, split: str, known: Accumulators | None = None
    ) -> tuple[Accumulators, DecoderScores]:
        """Returns the sums and the scores of a split, over all processes.

        Args:
          known: Sums of the split if the decoders were fitted on it; only the scores
            are then computed, and the offsets of expected F2 with them.
        """
        scores = self._scores(split, measure_offsets=known is not None)
        if known is None:
            known = self.passes.sums(split, self.decoders, scores)
        else:
            self.passes.decode(split, self.decoders, scores, target=split)
        scores.add_processes()
        return known, scores

    def figures(
        self, sums: Accumulators, scores: DecoderScores
    ) -> tuple[SplitMetrics, SplitFigures]:
        """Returns the figures of a split and those of its labels."""
        threshold = self.decoders.choice.threshold
        metrics = split_metrics(sums, scores, in_use=self.in_use, threshold=threshold)
        label_ids = scores.truth.label_ids
        of_labels = split_figures(
            np.asarray(sums.sums.histogram),
            hits=scores.hits,
            predicted=scores.labels,
            support=np.bincount(label_ids, minlength=len(scores.hits)),
        )
        return metrics, of_labels

    def _predict_tuning(self) -> dict[str, np.ndarray]:
        """Returns predictions for the submission's tuning images; {} if it has none.

        The model is the one that predicts the test: adapted to images of the test.
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

    def _scores(
        self, split: str, *, is_scored: bool = True, measure_offsets: bool = False
    ) -> DecoderScores:
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
            measure_offsets=measure_offsets,
        )


def _without_recurring(
    run: Run, splits: Sequence[str], trained: Provenance
) -> tuple[Run, list[str]]:
    """Adds, for each split, one without near copies of images that shaped the weights.

    Args:
      trained: See `_trained`. Adaptation to a split is not part of it, because each
        split is predicted by models adapted only to its own images.

    Returns:
      The run with the added splits, and the names of all.
    """
    data, names = run.data, list[str]()
    every = dict(data.splits)
    for split in splits:
        alone = data.without_recurring(split, _of_weights(trained))
        if alone is not None:
            every[alone.name] = alone
            names.append(alone.name)
        # After `alone`, because the report shows images of the last split.
        names.append(split)
    return run.on(replace(data, splits=every)), names


def _say_copies(run: Run, *, by_runs: bool) -> None:
    """Prints how many images of held-out domains are, or may be, copies.

    Args:
      by_runs: Whether the decoders are fitted on domains that other runs held out.
    """
    for domain, found in unseen.held_out_metrics(run).items() if by_runs else ():
        copies = (found.recurring or {}).get("held_out", 0)
        if copies:
            say(
                f"CAVEAT     {copies:,} images of {domain} are near copies of images "
                "that its model was trained on; the decoders are fitted on them too."
            )
    data = run.data
    if data.recurring is None and data.has_images("held_out"):
        shared = int(data.shares_group("held_out", "train").sum())
        if shared:
            say(
                f"CAVEAT     {shared:,} images of held_out share a group with a "
                "training image and may be copies of it; near copies were not searched "
                "for (prepare --near_copies=keep counts them)."
            )


def _recurring(
    data: Data, splits: Iterable[str], trained: Provenance
) -> dict[str, int] | None:
    """Returns the number of near copies in each split; None if not looked for."""
    if data.recurring is None:
        return None
    return {
        split: int(data.is_recurring(split, _of_weights(trained)).sum())
        for split in splits
        if not split.endswith(WITHOUT_RECURRING)
    }


def _of_weights(trained: Provenance) -> list[str]:
    """Returns the splits whose images shaped the weights."""
    return [*trained.weights.labels, *trained.weights.images]


def _trained(run: Run, members: Sequence[Run], options: InferenceOptions) -> Provenance:
    """Returns what influenced the checkpoints, before they are adapted.

    Args:
      run: The run, opened at the checkpoint.
      members: The run and those it is averaged with.

    Raises:
      InputError: If the run learned from images that it is measured on, and `options`
        do not allow it.
    """
    seen, *others = (member.provenance_on(run.data) for member in members)
    if seen.badge() != run.provenance.badge() and not options.allow_tuning_labels:
        raise InputError(
            f"{run.name} has learned from images of {run.data.directory} that it "
            f"would be evaluated on ({seen.badge()}); add --allow_tuning_labels to "
            "allow this."
        )
    return reduce(Provenance.union, others, seen)


def _provenance(
    trained: Provenance,
    options: InferenceOptions,
    splits: Sequence[str],
    tune_on: str,
    chooser: str,
) -> Provenance:
    """Returns what influences the figures.

    Args:
      trained: See `_trained`.
      tune_on: Split that fits the decoders.
      chooser: Split for choices that need embeddings or only the truth.
    """
    adapted = [split for split in splits if split != "validation"]
    corrected = [split for split in adapted if split != chooser]
    record = options.provenance(trained, adapted, corrected)
    record = record.with_("thresholds", labels=[tune_on, chooser])
    return record.with_("calibration", labels=[tune_on])


def _estimates(
    run: Run, metrics: Mapping[str, SplitMetrics], variant: Sequence[str]
) -> DomainShiftEstimate | None:
    """Returns estimates of F2 on new domains; None without held-out domains or test.

    Args:
      variant: Names of the options in use. Without one, runs that held out a domain
        are measured like this run.
    """
    measured = {} if variant else unseen.held_out_metrics(run)
    held_out = {domain: found.splits["held_out"] for domain, found in measured.items()}
    domain = run.config.data.held_out_domain
    if domain in run.data.domains:
        held_out = {domain: metrics["held_out"]}
    if not held_out or "test" not in metrics:
        return None
    return estimate(metrics["validation"], held_out, metrics["test"])


def _result(
    run: Run,
    *,
    metrics: Mapping[str, SplitMetrics],
    decoder: DecoderInUse,
    constant: Constant,
    provenance: Provenance,
    held_out: HeldOut | None,
    variant: Sequence[str],
    members: Sequence[tuple[str, str]],
    recurring: Mapping[str, int] | None,
) -> EvaluationResult:
    config, data, saved = run.config, run.data, run.saved
    params, _ = jax.eval_shape(run.plan(saved.stage).init, jax.random.key(0))
    return EvaluationResult(
        stage=saved.stage,
        step=saved.step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        seed=config.seed,
        dataset=f"{config.data.dataset} ({data.directory.name})",
        config_hash=config.content_hash(),
        label_hash=data.vocabulary.content_hash(),
        data_hash=data.content_hash,
        short_side_pixels=_short_side(run),
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        provenance=provenance,
        decoder=decoder,
        constant=constant,
        splits=metrics,
        estimates=_estimates(run, metrics, variant),
        held_out=held_out,
        variant=variant,
        members=[name for name, _ in members],
        member_hashes=[content_hash for _, content_hash in members],
        recurring=recurring,
        num_domains=len(data.domains),
    )


def _short_side(run: Run) -> int | None:
    """Returns the short side of the training images; None if it was not recorded."""
    metadata = run.checkpoints.metadata(run.saved)
    # Checkpoints of earlier versions do not have it.
    if (
        metadata.short_side_pixels is None
        and metadata.data_hash == run.data.content_hash
    ):
        return folder.short_side(run.data.directory)
    return metadata.short_side_pixels


def _constant(data: Data, splits: Sequence[str], chooser: str) -> Constant:
    """Returns the best constant prediction, whose length is chosen on `chooser`."""
    num_classes = len(data.vocabulary)
    counts = data.train_rows.class_counts(num_classes)
    truth = {
        split: data.verified_rows(split).of_scored().present()
        for split in {*splits, chooser}
    }
    best, _ = best_constant(counts, *truth[chooser])
    label_ids: list[int] = best.tolist()
    return Constant(
        labels=[data.vocabulary.codes[i] for i in label_ids],
        names=data.vocabulary.names(label_ids),
        f2={s: constant_f2(best, num_classes, *truth[s]) for s in splits},
    )
