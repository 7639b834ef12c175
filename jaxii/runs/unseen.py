"""Estimates for new domains, from runs that each held out a domain.

Such a run saves its predictions for the domain and the effect of adapting to it; the
run on all domains reads these files of all such runs.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
from jaxtyping import Bool

from jaxii.console import OnProgress, no_progress, say
from jaxii.data.dataset import Split
from jaxii.errors import InputError
from jaxii.evaluation import held_out
from jaxii.evaluation.held_out import HeldOut, Predictions
from jaxii.evaluation.predictions import ExpectedF2, answer
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.evaluation.provenance import HOME_SPLITS, Provenance
from jaxii.evaluation.result import EVALUATION, EvaluationResult
from jaxii.metrics.streaming import Accumulators
from jaxii.runs import assembly
from jaxii.runs.agreement import check_same_files
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.run import Run
from jaxii.storage import AnyPath
from jaxii.train.checkpoint import Checkpoints


def predict_held_out(
    run: Run, model: Model, on_progress: OnProgress = no_progress
) -> tuple[Predictions, HeldOut]:
    """Predicts a held-out domain, and measures decoders fitted on validation on it.

    Cost: three passes, and one for the statistics of BatchNorm.

    Args:
      run: A run with a domain held out.
      model: The model of its checkpoint.
      on_progress: Called with (images done, images in all, pass).
    """

    def scored(model: Model, split: str, what: str) -> Predictions:
        return predict_scored(
            run, model, split, lambda done, total, _: on_progress(done, total, what)
        )

    source = run.data.split("held_out").source
    adapted = model.adapted(assembly.unlabelled_batches(run.config, source), run.mesh)
    validation = scored(model, "validation", "validation predicted")
    decoders = held_out.fit([validation])
    own = scored(model, "held_out", "held_out predicted")
    of_adapted = scored(adapted, "held_out", "held_out adapted").probs
    gains = held_out.adaptation_gains(decoders, own, of_adapted)
    errors = held_out.expected_f2_errors(decoders, own)
    f2s = {"validation": validation.f2s(decoders), "held_out": own.f2s(decoders)}
    domain = run.config.data.held_out_domain
    return own, HeldOut(
        adaptation_gains={domain: gains},
        expected_f2_errors={domain: errors},
        f2s={domain: f2s},
    )


def read(run: Run, *, pooled: bool) -> tuple[list[Predictions], HeldOut | None]:
    """Reads the predictions and measurements of the runs that held out a domain.

    Args:
      run: The run on all domains.
      pooled: Whether decoders are fitted on these predictions instead of validation.

    Returns:
      The predictions, empty unless `pooled`; and the measurements with such decoders,
      None unless every domain of the run's dataset was held out.

    Raises:
      InputError: If `pooled` and a domain was not held out, or predictions are damaged
        or differ between processes.
    """
    metrics = held_out_metrics(run, say)
    known = [
        replace(own.held_out, length=run.workdir.held_out_length(domain))
        for domain, own in metrics.items()
        if own.held_out is not None
    ]
    complete = known and len(known) == len(metrics)
    record = reduce(HeldOut.union, known) if complete else None
    if record is not None and record.length < 1:
        say(
            f"CAVEAT     the hold-out runs have {record.length:.2g} of the length of "
            f"{run.workdir.path}, so figures on new domains are estimates for shorter "
            "training"
        )
    if not pooled:
        if record is not None:
            say("held out   --tune_on=held_out fits decoders on the held-out domains")
        return [], record
    workdirs = [run.workdir.held_out(domain) for domain in metrics]
    check_same_files(
        [workdir.result_file(EVALUATION) for workdir in workdirs],
        f"the hold-out runs of {run.workdir.path} are different",
    )
    if record is None:
        raise InputError(
            f"{run.workdir.path} does not have an evaluated hold-out run for each of "
            f"its domains {', '.join(run.data.domains)} at stage {run.saved.stage}; "
            f"run {_missing(run)} first."
        )
    predictions = {name: run.workdir.held_out_predictions(name) for name in metrics}
    for name, figures in metrics.items():
        run.workdir.held_out(name).check_current(figures)
    errors = held_out.errors_of_pools(predictions)
    return [*predictions.values()], replace(record, expected_f2_errors=errors)


def held_out_metrics(
    run: Run, warn: Callable[[str], None] = lambda text: None
) -> dict[str, EvaluationResult]:
    """Returns domain -> figures, at a run's stage, of the run that held it out.

    Empty unless every domain of the run's dataset was held out, because the mean over
    some domains estimates something else than the mean over all.

    Args:
      run: The run on all domains.
      warn: Called with a line for each run that is left out.
    """
    trained_on = run.checkpoints.metadata(run.saved).data_hash
    found: dict[str, EvaluationResult] = {}
    for domain, metrics in run.workdir.held_out_metrics(warn).items():
        if metrics.stage != run.saved.stage or domain not in run.data.domains:
            continue
        others = {*metrics.provenance.datasets} - {*run.provenance.datasets}
        others |= {metrics.data_hash} - {trained_on, run.data.content_hash}
        if others:
            warn(
                f"CAVEAT     {run.workdir.held_out(domain).path} is left out: its "
                f"dataset has hash {min(others)}, but that of {run.name} has hash "
                f"{trained_on}"
            )
        else:
            found[domain] = metrics
    return found if set(found) == set(run.data.domains) else {}


def _missing(run: Run) -> str:
    """Returns the commands that measure the hold-out runs at the stage of a run."""
    stage, commands = run.saved.stage, list[str]()
    names = [each.name for each in run.config.stages]
    measured = run.workdir.held_out_metrics()
    for domain in run.data.domains:
        metrics, path = measured.get(domain), run.workdir.held_out(domain).path
        if metrics and metrics.stage == stage and metrics.held_out:
            continue
        checkpoints = Checkpoints(path, names, "", read_only=True)
        with contextlib.closing(checkpoints):
            trained = checkpoints.saved().get(stage)
        if not trained or not trained[-1].finished:
            return "hold_out with the same --workdir"
        commands.append(f"evaluate --workdir={path} --stage={stage}")
    return " and ".join(commands) or "hold_out with the same --workdir"


def ranked(domains: Sequence[Predictions], own: Accumulators) -> Accumulators:
    """Returns sums over held-out domains with a run's own sums over embeddings."""
    pooled = held_out.pool([domain.sums() for domain in domains])
    sums = pooled.sums._replace(embedding=own.sums.embedding)
    return replace(pooled, sums=sums)


def expected_f2_error(
    metrics: EvaluationResult, options: InferenceOptions, decoder: str
) -> float | None:
    """Returns the error of an expected F2; None if it is unknown.

    Args:
      metrics: The evaluation that fitted the decoders.
      options: Options of the prediction.
      decoder: Name of the decoder in use.
    """
    # The error was measured with single models, without adaptation, and with decoders
    # that were fitted on images of the training domains.
    at_home = metrics.decoder.chosen_on in HOME_SPLITS
    if metrics.held_out is None or options.names or not at_home:
        return None
    return metrics.held_out.expected_f2_error(decoder)


def expected_f2_line(
    expected: ExpectedF2, workdir: AnyPath, num_domains: int | None
) -> str:
    """Returns the expected F2 for the console, and how to measure an unknown error.

    Args:
      num_domains: See `how_to_measure`.
    """
    line = f"expected F2 of these images: {expected}"
    if expected.error is not None:
        return line
    measuring = how_to_measure(workdir, num_domains)
    if num_domains == 1:
        command = f"evaluate --workdir={workdir} --images=DIR"
        measuring += f"; {command} measures F2 on images with labels"
    return f"{line} (error unknown; {measuring})"


def say_caveats(
    provenance: Provenance,
    record: HeldOut | None,
    options: InferenceOptions,
    decoder: str,
    workdir: AnyPath,
    num_domains: int | None,
) -> None:
    """Prints the caveats of the figures, and the measured effect of adapting.

    Args:
      provenance: Provenance of the figures or predictions.
      record: Measurements on held-out domains; None if nothing was measured.
      options: Options of the prediction.
      decoder: Name of the decoder in use.
      workdir: Workdir of the run on all domains.
      num_domains: See `how_to_measure`.
    """
    for caveat in provenance.caveats():
        say(f"CAVEAT     {caveat}")
    way = "_".join(name for name in options.names if name != "ensemble")
    if not way:
        return
    gain = None if record is None else record.adaptation_gain(way, decoder)
    if gain is None:
        say(
            f"CAVEAT     the effect of {way} on new domains is unknown; "
            f"{how_to_measure(workdir, num_domains)}."
        )
        return
    mean, deviation = gain
    say(
        f"adapted    {way}: change of F2 on held-out domains {mean:+.2f} "
        f"± {deviation:.2f}"
    )
    if mean < 0:
        say(
            f"CAVEAT     {way} lowered F2 on held-out domains; do not use it unless "
            "labels of the target domain show that it helps there."
        )


def how_to_measure(workdir: AnyPath, num_domains: int | None) -> str:
    """Returns the commands that measure a run on new domains, or why none can.

    Args:
      num_domains: Number of domains of the training data; None if unknown.
    """
    if num_domains == 1:
        return "the training data has only one domain, so none can be held out"
    return (
        f"run hold_out --workdir={workdir}, then evaluate --workdir={workdir} to "
        "measure it on held-out domains"
    )


def predict_scored(
    run: Run, model: Model, split: str, on_progress: OnProgress = no_progress
) -> Predictions:
    """Returns predictions for the scored images of a split; some if there are many."""
    most = held_out.MOST_NUMBERS // len(run.data.vocabulary)
    rows = assembly.scored_rows(run.data, split, most)
    part = run.data.split(split).select(rows)
    predictions, _ = predict_split(run, model, part, on_progress)
    return predictions


def predict_split(
    run: Run,
    model: Model,
    split: Split,
    on_progress: OnProgress = no_progress,
) -> tuple[Predictions, Bool[np.ndarray, "image class"]]:
    """Returns predictions for all images of a split, and which labels are verified.

    No label of a damaged image counts as verified.
    """
    data = replace(run.data, splits={**run.data.splits, split.name: split})
    truth, verified = data.verified_rows(split.name).multi_hot(len(data.vocabulary))
    probs = np.zeros(truth.shape, np.float32)
    for given in answer(
        make_predict([model], run.mesh),
        assembly.file_batches(run.config, split.source),
        num_rows=len(probs),
        mesh=run.mesh,
        on_progress=on_progress,
    ):
        probs[given.row] = given.probs
        verified[given.row] &= not given.fault
    found = Predictions(image_ids=split.index.image_ids, probs=probs, truth=truth)
    return found, verified
