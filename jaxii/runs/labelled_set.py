"""Measures a trained run on labelled images that are not a split of its data.

Needs only the workdir. The images are treated like a test split: files are reduced as
`prepare` reduces them, and the figures come from the same passes, decoders and sums.
"""

import datetime
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxii.config import flatten
from jaxii.console import progress, say
from jaxii.data import index
from jaxii.data.dataset import Split
from jaxii.data.prepared import SPLITS, WITHOUT_RECURRING, Data, Rows
from jaxii.data.seen import SeenImages
from jaxii.decoding.constant import constant_f2
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import by_label
from jaxii.evaluation.by_label import SplitFigures
from jaxii.evaluation.decoder_scores import DecoderScores
from jaxii.evaluation.details import Details, make_gallery
from jaxii.evaluation.image_records import LabelledFiles, Listing, thumbnails
from jaxii.evaluation.result import (
    EVALUATION,
    SetResult,
    check_evaluation,
    describe_again,
    hardware,
    write_evaluation,
)
from jaxii.manifest import describe
from jaxii.metrics.streaming import Accumulators
from jaxii.models.multitask import EMBEDDING_HEAD
from jaxii.prepare.image_files import is_text
from jaxii.prepare.image_ids import below_any_folder
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.labelled import Labelled
from jaxii.prepare.tables.notes import Notes
from jaxii.runs import assembly
from jaxii.runs.agreement import check_same_evaluation, check_same_runs
from jaxii.runs.evaluate import AS_TRAINED, Passes, Scoring
from jaxii.runs.results import FITTED_FILE, THUMBNAIL_PIXELS, sets_of_report
from jaxii.runs.run import Run
from jaxii.storage import locked, write_json, write_text


def evaluate_set(
    run: Run, *, images: Path, labels: Path | None, name: str, **options: Any
) -> SetResult:
    """Measures a run on a labelled set; writes the figures and the report's section.

    Args:
      run: The run, opened at the checkpoint that was evaluated.
      images: The folder of images.
      labels: The label file; None takes the folders of the images as labels.
      name: Name of the set; "" for the name of the folder. An earlier result of this
        name is replaced.
      options: How the label file is read; see `tables.labelled.read`.

    Raises:
      InputError: If the run has not been evaluated, the name is that of a split, or the
        images or labels cannot be used.
    """
    name = name or images.name
    # Pages show the names of splits with spaces.
    is_split = name.replace(" ", "_").removesuffix(WITHOUT_RECURRING) in SPLITS
    if not name or is_split or not is_text(name):
        what = "the name of a split" if is_split else "empty or not UTF-8"
        raise InputError(
            f"name={name!r} is {what}; use another name for the labelled set, such "
            "as holiday."
        )
    run.check_evaluated(run.metrics)
    check_same_runs([run])
    check_same_evaluation(run.workdir)
    run.workdir.check_writable()
    _check_report(run)
    found = _read(run, images, labels, **options)
    data = _data_of(run, found, images, name)
    processes.check_same(data.content_hash, "the images or labels are different")
    result = _result(run, found, data, name)
    for caveat in result.caveats():
        say(f"CAVEAT     {caveat}")
    other = run.on(data)
    scoring, sums, scores = _measure(other, name)
    figures, of_labels = scoring.figures(sums, scores)
    # As for a split, listed images without a label are counted, too.
    without = figures.num_images_without_truth + found.num_unlabelled
    figures = replace(figures, num_images_without_truth=without)
    result = replace(result, splits={name: figures})
    if processes.is_lead():
        with locked(run.workdir.path):
            _write(other, result, of_labels, scores)
    processes.wait_for_all("set")
    return result


def _check_report(run: Run) -> None:
    """Checks that a section can be added to the report, before the measurement."""
    # Imported here: matplotlib takes most of a second.
    from jaxii.report.page import with_sets

    report = run.workdir.result_file("report.html")
    check_evaluation(
        run.workdir.result_file(EVALUATION),
        [report.name, by_label.FILE, FITTED_FILE],
        again="run evaluate again first",
    )
    with_sets(report.read_text(encoding="utf-8"), {})


def _measure(run: Run, name: str) -> tuple[Scoring, Accumulators, DecoderScores]:
    """Measures the set, which is the data of `run`, in one pass."""
    model, decoders = run.model(), run.decoders
    names = decoders.names(has_head=EMBEDDING_HEAD in model.params)
    num_images = run.data.split(name).num_examples
    with progress() as on_progress:
        passes = Passes(
            run=run,
            models=[model],
            options=AS_TRAINED,
            chooser="",
            evaluator=run.evaluator(),
            global_batch_size=assembly.file_batch_size(run.config, num_images),
            on_progress=on_progress,
        )
        in_use = run.metrics.decoder.name
        scoring = Scoring(run, passes, decoders, names, in_use)
        return scoring, *scoring.sums(name)


def _read(run: Run, images: Path, labels: Path | None, **options: Any) -> Labelled:
    notes = Notes()
    with notes.printed(), progress() as on_progress:
        found = labelled.read(
            images,
            labels,
            notes,
            vocabulary=run.vocabulary,
            on_progress=on_progress,
            **options,
        )
        if "split" in found.extra:
            notes.assumed("all images are evaluated, regardless of their split")
        return found


def _data_of(run: Run, found: Labelled, images: Path, name: str) -> Data:
    """Returns the set as the only split of a dataset."""
    numbers = sorted(range(len(found.files)), key=lambda i: found.ids[i])
    # Domains are the slices if the label file has no slices.
    extra = {"slice": found.extra["domain"]} if "domain" in found.extra else {}
    found = replace(found, extra=extra | dict(found.extra))
    table = found.table(numbers, is_test=True)
    slices = tuple(sorted(table["slice"].unique()))
    columns = index.columns(table, slices)
    if found.file_hashes is not None:
        hashes = np.array([found.file_hashes[i] for i in numbers], np.uint64)
        columns = replace(columns, file_hashes=hashes)
    listing = Listing(
        Path(),
        [found.files[i] for i in numbers],
        [found.ids[i] for i in numbers],
        os.fspath(images),
    )
    files = LabelledFiles(
        listing=listing,
        short_side=assembly.largest_short_side(run.config, run.short_side_pixels),
        index=columns,
    )
    data = Data(
        directory=images,
        vocabulary=run.vocabulary,
        slices=slices,
        domains=(),
        splits={name: Split(name, columns, files)},
        train_rows=Rows(
            offsets=np.zeros(1, np.int64),
            label_ids=np.zeros(0, np.int32),
            confidences=np.zeros(0, np.float32),
        ),
        content_hash=columns.content_hash(),
        submission_ids=(),
    )
    data.check_truth(name)
    return data


def _result(run: Run, found: Labelled, data: Data, name: str) -> SetResult:
    """Returns the result without its figures."""
    metrics, vocabulary = run.metrics, run.vocabulary
    record = metrics.provenance.union(run.provenance)
    trained_on = SeenImages.load(run.workdir.seen_file)
    fitted_on = SeenImages.load(run.workdir.result_file(FITTED_FILE))
    # The folder of the training images may be above or below that of the set.
    seen = trained_on.union(fitted_on).count_any(
        map(below_any_folder, found.files), found.file_hashes
    )
    for part in seen:
        record = record.with_(part, labels=[name])
    best = np.array([vocabulary.index[code] for code in metrics.constant.labels])
    truth = data.verified_rows(name).of_scored().present()
    f2 = {name: constant_f2(best, len(vocabulary), *truth)}
    return SetResult(
        name=name,
        decoders_hash=describe(run.workdir.result_file("decoders.npz")).xxh3,
        num_seen=seen,
        unknown_labels=tuple(found.unused),
        broken_images=tuple(found.broken),
        stage=run.saved.stage,
        step=run.saved.step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        seed=run.config.seed,
        dataset=f"labelled set ({data.directory})",
        config_hash=metrics.config_hash,
        label_hash=vocabulary.content_hash(),
        data_hash=data.content_hash,
        short_side_pixels=metrics.short_side_pixels,
        num_params=metrics.num_params,
        provenance=record,
        decoder=replace(metrics.decoder, choice=run.decoders.choice),
        constant=replace(metrics.constant, f2=f2),
        splits={},
        members=metrics.members,
        member_hashes=metrics.member_hashes,
    )


def _write(
    run: Run, result: SetResult, of_labels: SplitFigures, scores: DecoderScores
) -> None:
    """Writes the files of a set, adds its section to the report, prints the figures.

    Args:
      run: The run, with the set as its data.
    """
    from jaxii.report.page import render, with_sets

    name, workdir = result.name, run.workdir
    of_run = by_label.load(workdir.result_file(by_label.FILE))
    labels = replace(of_run, splits={name: of_labels})
    source = run.data.split(name).source
    gallery = make_gallery(
        name,
        scores,
        vocabulary=run.vocabulary,
        image_ids=run.data.split(name).index.image_ids,
        thumbnail=thumbnails(source, THUMBNAIL_PIXELS),
    )
    page = render(
        f"{name}: {workdir.path.absolute().name}",
        result,
        config=flatten(run.config.to_dict()),
        details=Details(labels=labels, gallery=gallery),
    )
    workdir.check_current(run.metrics)
    # Removed first: without the manifest, no file of the set is used.
    listed = workdir.set_file(name, EVALUATION)
    listed.unlink(missing_ok=True)
    files = [
        workdir.set_file(name, file)
        for file in ("metrics.json", by_label.FILE, "report.html")
    ]
    write_json(files[0], result.to_json())
    labels.save(files[1])
    write_text(files[2], page)
    write_evaluation(listed, files)
    report = workdir.result_file("report.html")
    sets = sets_of_report(workdir, run.metrics)
    write_text(report, with_sets(report.read_text(encoding="utf-8"), sets))
    describe_again(workdir.result_file(EVALUATION), report)
    for line in result.lines():
        say(line)
    say(f"fitted     nothing on {name}; calibration and thresholds are the run's")
    for file in (*files, report):
        say(f"{file.name:17} {file}")
