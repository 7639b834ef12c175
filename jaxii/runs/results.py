"""Writes the files of an evaluation: figures, decoders, report, submission."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from jaxii.config import flatten
from jaxii.console import say
from jaxii.data.prepared import Data
from jaxii.data.seen import Hashes, SeenImages
from jaxii.decoding.decoders import Decoders
from jaxii.errors import InputError
from jaxii.evaluation import by_label, predictions
from jaxii.evaluation.by_label import LabelTable, SplitFigures
from jaxii.evaluation.decoder_scores import DecoderScores
from jaxii.evaluation.details import Details, StageRow, label_map, make_gallery
from jaxii.evaluation.held_out import FILE, Predictions
from jaxii.evaluation.image_records import thumbnails
from jaxii.evaluation.result import (
    EVALUATION,
    EvaluationResult,
    SetResult,
    write_evaluation,
)
from jaxii.prepare.image_ids import meant
from jaxii.report.run_files import SETS, read_sets
from jaxii.runs.run import Run
from jaxii.runs.start_point import StartPoint
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, locked, write_json, write_text
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Origin, Saved, choose
from jaxii.train.telemetry.history import read_history
from jaxii.train.trainer import StagePlan

THUMBNAIL_PIXELS = 160
# The images that the decoders were fitted on.
FITTED_FILE = "fitted_images.npz"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Scores and predictions of the splits.

    Attributes:
      scores: Scores by split, for splits with labels.
      labels: Figures of each label by split.
      submitted: Image id -> predicted label ids, for the readable images of a
        submission; empty without a test.
      fitted_on: Hashes of the images that the decoders were fitted on.
      held_out: Predictions for a held-out domain, to be saved; None without one.
    """

    scores: Mapping[str, DecoderScores]
    labels: Mapping[str, SplitFigures]
    submitted: Mapping[str, np.ndarray]
    fitted_on: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    held_out: Predictions | None = None


def write(
    run: Run,
    evaluation: EvaluationResult,
    decoders: Decoders,
    measured: Measured,
    variants: Sequence[str],
) -> None:
    """Writes all files to the workdir and prints the figures; for the lead process.

    Args:
      variants: How the evaluation differs from the run's own; part of file names.
    """
    # Another evaluation, or a training, may write at the same time.
    with locked(run.workdir.path):
        rows, files = _write(run, evaluation, decoders, measured, variants)
    _say(run, evaluation, rows, files)


def _write(
    run: Run,
    evaluation: EvaluationResult,
    decoders: Decoders,
    measured: Measured,
    variants: Sequence[str],
) -> tuple[Sequence[StageRow], Mapping[str, AnyPath]]:
    """Writes all files; returns the rows of the stages, and the files to print."""
    # Imported here: matplotlib takes most of a second, also when training starts.
    from jaxii.report.page import render, with_sets

    workdir, data = run.workdir, run.data
    files = {"metrics.json": workdir.result_file("metrics.json", variants)}
    # Removed first: without the manifest, no file of the evaluation is used.
    listed = workdir.result_file(EVALUATION, variants)
    listed.unlink(missing_ok=True)
    decoders_file = workdir.result_file("decoders.npz", variants)
    decoders.save(decoders_file)
    fitted_file = workdir.result_file(FITTED_FILE, variants)
    parts = "calibration", "thresholds"
    SeenImages(dict.fromkeys(parts, measured.fitted_on)).save(fitted_file)
    if measured.held_out is not None:
        path = files[FILE] = workdir.result_file(FILE, variants)
        measured.held_out.save(path, evaluation.label_hash)
    if measured.submitted:
        path = files["submission.csv"] = workdir.result_file("submission.csv", variants)
        _write_submission(path, data, evaluation, measured.submitted)
    labels = LabelTable(
        vocabulary=data.vocabulary,
        train_images=data.train_rows.class_counts(len(data.vocabulary)),
        thresholds=decoders.class_thresholds.astype(np.float64),
        splits=measured.labels,
    )
    files[by_label.FILE] = workdir.result_file(by_label.FILE, variants)
    labels.save(files[by_label.FILE])
    write_json(files["metrics.json"], evaluation.to_json())
    point = StartPoint.load(workdir)
    origin = str(point or run.config.start_from or run.config.model.pretrained)
    size = run.config.global_batch_size
    rows = _stage_rows(run.plans, run.checkpoints, origin, size)
    if run.history_fault:
        say(f"CAVEAT     {run.history_fault}; the report has no training curves")
    files["report.html"] = workdir.result_file("report.html", variants)
    page = render(
        files["report.html"].parent.absolute().name,
        evaluation,
        history=[] if run.history_fault else read_history(workdir.history_file),
        config=flatten(run.config.to_dict()),
        stages=rows,
        details=_details(run, labels, measured),
        recipe=_recipe(run),
    )
    if not variants:
        page = with_sets(page, sets_of_report(workdir, evaluation))
    write_text(files["report.html"], page)
    others = decoders_file, fitted_file, workdir.config_file, workdir.history_file
    write_evaluation(listed, [*files.values(), *others])
    return rows, files


def _say(
    run: Run,
    evaluation: EvaluationResult,
    rows: Sequence[StageRow],
    files: Mapping[str, AnyPath],
) -> None:
    """Prints figures, stages and paths."""
    for line in evaluation.lines():
        say(line)
    for row in rows:
        say(
            f"stage     {row.name}: steps {row.first_step}-{row.last_step}, "
            f"{'with' if row.embedding_head else 'without'} embedding head, "
            f"train_step compiled {row.train_step_compilations} time(s)"
        )
    for name, path in files.items():
        say(f"{name:17} {path}")
    folder = run.workdir.path / run.checkpoints.directory.name
    say(f"{'checkpoints':17} {folder}")


def sets_of_report(
    workdir: Workdir, evaluation: EvaluationResult
) -> dict[str, SetResult]:
    """Returns the labelled sets of the report; prints those to evaluate again.

    Args:
      evaluation: The run's own evaluation.
    """
    try:
        sets = read_sets(workdir.path, evaluation)
    except InputError as error:
        say(f"CAVEAT     the report has no labelled sets: {error}")
        return {}
    present = {path.parent.name for path in (workdir.path / SETS).glob("*/*.json")}
    for folder in sorted(present - sets.keys()):
        say(
            f"CAVEAT     the labelled set {folder} is outdated or incomplete; evaluate "
            "it again"
        )
    return sets


def _write_submission(
    path: AnyPath,
    data: Data,
    evaluation: EvaluationResult,
    answers: Mapping[str, np.ndarray],
) -> None:
    """Writes a row for each id of the submission."""
    image_ids = data.submission_ids or tuple(answers)
    answered = [meant(image_id, answers) for image_id in image_ids]
    constant = evaluation.constant
    fallback = predictions.fallback_labels(constant.labels, data.vocabulary)
    predictions.write_submission(
        path,
        image_ids,
        [answers.get(image_id, fallback) for image_id in answered],
        data.vocabulary,
        evaluation.provenance.to_json,
    )
    unanswered = sum(image_id not in answers for image_id in answered)
    if unanswered:
        say(
            f"submission {unanswered} of {len(image_ids)} images are missing or cannot "
            "be read; they get the most frequent labels "
            f"({predictions.shortened(constant.names)})"
        )


def _recipe(run: Run) -> Origin:
    """Returns the recipe and flags that the configuration was made from."""
    recipe = run.checkpoints.metadata(run.saved).recipe
    # The dataset of an evaluation may have moved.
    directory = run.workdir.config().data.directory
    if directory != run.config.data.directory and "own" in recipe:
        recipe["own"].setdefault("data.directory", directory)
    return recipe


def _details(run: Run, labels: LabelTable, measured: Measured) -> Details:
    data, made = run.data, run.label_embedding
    split, scores = list(measured.scores.items())[-1]
    of_split = data.split(split)
    gallery = make_gallery(
        split,
        scores,
        vocabulary=data.vocabulary,
        image_ids=of_split.index.image_ids,
        thumbnail=thumbnails(of_split.source, THUMBNAIL_PIXELS),
    )
    return Details(
        labels=labels,
        label_map=None if made is None else label_map(made.vectors),
        gallery=gallery,
    )


def _stage_rows(
    plans: Sequence[StagePlan],
    checkpoints: Checkpoints,
    origin: str,
    global_batch_size: int,
) -> list[StageRow]:
    """Returns a row of the report's stage table for each stage that has begun.

    Args:
      origin: The checkpoint or file that the first stage starts from; "" for none.
      global_batch_size: That of the plans.
    """
    found = checkpoints.saved()
    rows: list[StageRow] = []
    previous: Sequence[Saved] = ()
    for plan in plans:
        saved = found.get(plan.stage.name)
        if not saved:
            break
        best, last = choose(saved, "best"), choose(saved, "last")
        of_last = checkpoints.metadata(last)
        ends = [
            plan.settings.objective.weights(jnp.asarray(step, jnp.int32))
            for step in (0, plan.stage.steps_done(last, global_batch_size))
        ]
        rows.append(
            StageRow(
                name=plan.stage.name,
                first_step=last.first_step,
                last_step=last.step,
                embedding_head=plan.stage.embedding_head,
                terms={name: [float(end[name]) for end in ends] for name in ends[0]},
                enters_from=_entered_from(plan, previous, origin),
                train_step_compilations=of_last.train_step_compilations,
                best_step=best.step,
                best_f2=best.metric,
            )
        )
        previous = saved
    return rows


def _entered_from(plan: StagePlan, previous: Sequence[Saved], origin: str) -> str:
    if not previous:
        return origin or "fresh parameters"
    start = choose(previous, plan.stage.enters_from)
    return f"{plan.stage.enters_from} of {start.stage} (step {start.step})"
