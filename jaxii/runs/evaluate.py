"""`evaluate`: the best checkpoint of a stage on every split that has labels.

Called by `main`, and by `train` when the last stage has ended; leaves the figures, the
report and the answers in the workdir.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np

from jaxii.data import folder
from jaxii.data.prepared import Data
from jaxii.decoding import decoders as decoding
from jaxii.decoding.thresholds import choose
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import predictor as prediction
from jaxii.evaluation import result
from jaxii.evaluation.decoder_scores import Scores
from jaxii.evaluation.domain_shift import estimate, pool
from jaxii.evaluation.evaluator import OnBatch
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.summary import summarise
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
) -> dict[str, Any]:
    """Measures the best checkpoint of a stage, writes figures, report and answers.

    Args:
      session: of the run.
      stage: name; "" is the last one trained.
      tune_on: the split that the decoders are fitted on; "" is the run's own choice.
      decoder: whose answers are the result and the submission; all are scored.
      variant: what is done to the model before.
    """
    tune_on = tune_on or session.data.choosing_split
    # Domains that other runs held out give a threshold; all else is chosen on images.
    by_runs = tune_on == "held_out" and not session.data.has_images("held_out")
    chooser = "validation" if by_runs else tune_on
    session.data.check_truth(chooser)
    saved = session.checkpoints.best_of(stage)
    members = _members(session, saved, variant)
    splits = [
        split
        for split in dict.fromkeys((chooser, "validation", "held_out", "test"))
        if session.data.has_images(split)
    ]
    away = [split for split in splits if split != "validation"]
    record = _record_of(session, members, variant)
    measured_on = [split for split in away if split != chooser]
    provenance = variant.provenance(record, away, measured_on)
    provenance = provenance.with_("thresholds", labels=[tune_on, chooser])
    provenance = provenance.with_("calibration", labels=[chooser])
    say_first(provenance)
    sums_of = _passes(session, members, variant, chooser)
    chosen_sums = sums_of(chooser)
    choice = choose(chosen_sums)
    if by_runs:
        choice = replace(choice, threshold=_threshold_of_runs(session, saved.stage))
    made = session.label_embedding
    vectors = None if made is None else made.vectors
    decoders = decoding.fit(chosen_sums, choice, label_embeddings=vectors)
    has_head = session.plan(saved.stage).stage.embedding_head and len(members) == 1
    names = decoders.names(has_head=has_head)
    decoders.check(decoder, names)
    measured = _answer(session, splits, sums_of, decoders, names, decoder)
    chosen = {"name": decoder, "chosen_on": tune_on, **asdict(choice)}
    metrics = _result(session, saved, measured.summaries, chosen, chooser, provenance)
    metrics |= _estimates(session, saved, measured.summaries)
    metrics |= {"variant": variant.names, "members": [m.name for m in members]}
    if processes.is_lead():
        elsewhere = tune_on != session.data.choosing_split
        variants = [f"tuned_on_{tune_on}"] * elsewhere + variant.names
        results.write(session, metrics, decoders, measured, variants, saved)
    processes.wait_for_all("results")
    for other in members[1:]:
        other.close()
    return metrics


def _answer(session, splits, sums_of, decoders, names, decoder) -> Measured:
    """Passes over every split: its figures, and the answers for the submission."""
    data, summaries, scored, labels = session.data, {}, {}, {}
    answers: dict[str, np.ndarray] = {}
    for split in splits:
        scores = _scores(session, split, decoders, names, decoder)
        taker = None
        if split == "test":
            rows = data.split(split).num_examples
            taker = prediction.Answers(rows, decoders.answer(decoder))
        sums = sums_of(split, decoders, _each(scores, taker))
        if taker is not None:
            answers |= zip(data.split(split).index.image_ids, taker.labels, strict=True)
        if scores is not None:
            summary = summarise(sums, data.slices, choice=decoders.choice)
            summaries[split] = summary | scores.summary()
            scored[split], labels[split] = scores, scores.by_label(sums)
    if answers:
        answers |= _answer_tuning(data, sums_of, decoders, decoder)
    return Measured(summaries=summaries, scores=scored, labels=labels, answers=answers)


def _answer_tuning(data: Data, sums_of, decoders, decoder) -> dict[str, np.ndarray]:
    """Returns the answers for tuning images, where the submission has rows for them.

    The model answers them as it answers the test: what it adapts to is the test.
    """
    if not data.has_images("tuning"):
        return {}
    image_ids = data.split("tuning").index.image_ids
    if set(image_ids).isdisjoint(data.submission_ids):
        return {}
    taker = prediction.Answers(len(image_ids), decoders.answer(decoder))
    sums_of("tuning", decoders, taker.add, target="test")
    return dict(zip(image_ids, taker.labels, strict=True))


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


def _passes(
    session: Session, members: Sequence[Trained], variant: Variant, chooser: str
) -> Callable[..., Accumulators]:
    """Returns the function that sums a split, and shows each batch to a taker.

    The model adapts to the images of `target`, by default those of the split itself.
    """
    own, *others = members
    models = [other.model(session.mesh) for other in others]
    # The network of the plan: for it the prediction may have been compiled already.
    apply = session.plan(own.saved.stage).settings.apply
    models.insert(0, own.model(session.mesh, apply))
    evaluator, data = session.evaluator(), session.data

    def sums_of(split, decoders=None, on_batch=None, target=""):
        target = target or split

        def images():
            source = data.split(target).source
            return assemble.unlabelled_batches(session.config, source)

        adapts = variant if target != "validation" else AS_TRAINED
        # What calibrates is at home where it was fitted.
        home = decoders if target != chooser else None
        return evaluator.run(
            adapts.predict_on(models, session.mesh, images, home),
            assemble.eval_batches(session.config, data, split),
            verified_absent=session.verified_absent(split),
            on_batch=on_batch,
        )

    return sums_of


def _scores(session, split, decoders, names, in_use) -> Scores | None:
    # A test whose labels nobody has is answered, and not scored.
    if not session.data.has_truth(split):
        return None
    verified = session.data.verified_rows(split)
    offsets, label_ids = verified.present()
    index = session.data.split(split).index
    return Scores(
        decoders,
        names,
        in_use=in_use,
        offsets=offsets,
        label_ids=label_ids,
        scored=verified.scored(),
        slice_ids=index.slice_ids,
        slices=session.data.slices,
        groups=index.groups,
    )


def _each(*takers: Scores | prediction.Answers | None) -> OnBatch:
    def take(probs, embedding, rows):
        for taker in takers:
            if taker is not None:
                taker.add(probs, embedding, rows)

    return take


def _threshold_of_runs(session: Session, stage: str) -> float:
    found = session.held_out_figures(stage)
    if found:
        return pool(found).threshold
    raise InputError(
        f"{session.workdir.path} has not been trained without each of the domains "
        f"{', '.join(session.data.domains)} and evaluated at its stage {stage}; run "
        "hold_out with the same --workdir first."
    )


def _estimates(session: Session, saved: Saved, summaries) -> dict[str, Any]:
    """Returns what was foretold without target data, where the test can tell."""
    held_out = session.held_out_figures(saved.stage)
    if "held_out" in summaries:
        held_out = {session.config.data.held_out_domain: summaries["held_out"]}
    if not held_out or "test" not in summaries:
        return {}
    found = estimate(summaries["validation"], held_out, summaries["test"])
    return {"estimates": found}


def _result(session, saved, summaries, decoder, chooser, provenance) -> dict[str, Any]:
    config, data = session.config, session.data
    counts = data.train_rows.class_counts(len(data.vocabulary))
    constant = result.best_constant_of(
        counts,
        lambda split: data.verified_rows(split).of_scored().present(),
        list(summaries),
        chooser,
    )
    return result.make_result(
        saved=saved,
        summaries=summaries,
        decoder=decoder,
        constant=constant,
        vocabulary=data.vocabulary,
        provenance=provenance,
        facts={
            "config_hash": config.content_hash(),
            "label_hash": data.vocabulary.content_hash(),
            "data_hash": data.content_hash,
            "seed": config.seed,
            "dataset": f"{config.data.dataset} ({data.directory.name})",
            "short_side_pixels": folder.short_side(data.directory),
            "num_params": _num_params(session, saved),
        },
    )


def _num_params(session: Session, saved: Saved) -> int:
    plan = session.plan(saved.stage)
    params, _ = jax.eval_shape(plan.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))
