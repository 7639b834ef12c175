"""`suspects`: lists labels of the training data that are likely wrong or missing.

Each image is predicted by a run that was not trained on it: a run of `hold_out`, or the
run itself if the image is in its validation split.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from jaxtyping import Bool

from jaxii.console import progress, say
from jaxii.data.dataset import Split
from jaxii.distributed import processes
from jaxii.evaluation import suspects as ranking
from jaxii.evaluation.held_out import Predictions
from jaxii.evaluation.image_records import thumbnails
from jaxii.evaluation.provenance import HOME_SPLITS, Provenance
from jaxii.evaluation.suspects import Suspects
from jaxii.report import sheet as pages
from jaxii.report.sheet import SuspectImage
from jaxii.runs.agreement import check_same_data, check_same_runs
from jaxii.runs.run import Run
from jaxii.runs.unseen import predict_split
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, check_writable, write_text

# Splits of the training data whose images a run was not trained on.
UNSEEN = ("held_out", "validation")


def suspects(
    workdir: Workdir, *, data_dir: str, output: AnyPath, sheet: AnyPath, top: int
) -> None:
    """Writes the labels that are most likely wrong or missing.

    Memory: images x labels x 12 bytes.

    Args:
      workdir: Workdir of a trained run, or of `hold_out`.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      output: The CSV file.
      sheet: The contact sheet of the images.
      top: Largest number of labels to write.

    Raises:
      InputError: If nothing has been trained, the data has other labels, a run was
        trained on images that it would predict, processes read different files, or a
        file cannot be written.
    """
    with ExitStack() as opened:
        runs = [opened.enter_context(run) for run in _open(workdir, data_dir)]
        check_same_runs(runs)
        check_same_data(runs)
        # Folds come first, because a domain not trained on is harder to predict.
        runs.sort(key=lambda run: run.config.data.held_out_domain in run.data.domains)
        # Raises an error, before any prediction, if a run was trained on these images.
        provenance = reduce(
            Provenance.union, (run.provenance_on(run.data) for run in runs)
        )
        for path in (output, sheet):
            processes.check_on_lead(partial(check_writable, path))
        parts = list(_predict(runs))
        found = ranking.rank(
            np.concatenate([part.found.probs for part in parts]),
            np.concatenate([part.found.truth for part in parts]),
            np.concatenate([part.known for part in parts]),
        )
        if processes.is_lead():
            _write(
                found.first(top),
                parts,
                runs,
                output=output,
                sheet=sheet,
                provenance=provenance,
                num_found=len(found),
            )
    _say_predicted(runs, parts, workdir)
    given = int(found.given.sum())
    say(
        f"suspects  {len(found)} labels: {given} present but likely wrong, and "
        f"{len(found) - given} absent but likely missing; the top {top}:"
    )
    say(f"labels    {output}")
    say(f"sheet     {sheet}")


def _open(workdir: Workdir, data_dir: str) -> Iterator[Run]:
    """Yields the runs that held out a part, or the run itself if there are none."""
    label_hash = workdir.vocabulary().content_hash()
    for part in workdir.held_out_metrics(say) or ("",):
        path = workdir.held_out(part).path if part else workdir.path
        yield Run.open(path, data_dir=data_dir, label_hash=label_hash)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Images, and the predictions of a run that was not trained on them.

    Attributes:
      known: Whether the truth of a label is known: not for images without verified
        labels, nor for unlisted labels if `data.unknown` is "ignored".
    """

    split: Split
    found: Predictions
    known: Bool[np.ndarray, "image class"]


def _predict(runs: Sequence[Run]) -> Iterator[_Part]:
    """Yields, once, every image that at least one of the runs was not trained on."""
    seen: set[str] = set()
    for unseen, run in itertools.product(UNSEEN, runs):
        if run.data.has_images(unseen):
            split = run.data.split(unseen)
            image_ids: list[str] = split.index.image_ids.tolist()
            rows = [
                row for row, image_id in enumerate(image_ids) if image_id not in seen
            ]
            if rows:
                part = split.select(np.array(rows))
                with progress() as on_progress:
                    found, known = predict_split(run, run.model(), part, on_progress)
                if run.config.data.unknown == "negative":
                    known |= known.any(axis=1, keepdims=True)
                yield _Part(split=part, found=found, known=known)
                seen.update(image_ids)


def _write(
    found: Suspects,
    parts: Sequence[_Part],
    runs: Sequence[Run],
    *,
    output: AnyPath,
    sheet: AnyPath,
    provenance: Provenance,
    num_found: int,
) -> None:
    """Writes the CSV file and the contact sheet."""
    vocabulary = runs[0].vocabulary
    image_ids = np.concatenate([part.split.index.image_ids for part in parts])
    ranking.save(
        found,
        output,
        vocabulary=vocabulary,
        image_ids=image_ids,
        splits=[part.split.name for part in parts for _ in part.known],
        domains=np.concatenate([part.split.index.domains for part in parts]),
    )
    places = [(part, row) for part in parts for row in range(len(part.known))]

    def shown(image: int) -> SuspectImage:
        part, row = places[image]
        its = np.flatnonzero(found.rows == image)
        names = vocabulary.names(found.label_ids[its])
        given, scores = found.given[its].tolist(), found.scores[its].tolist()
        return SuspectImage(
            image_id=str(image_ids[image]),
            labels=list(zip(names, given, scores, strict=True)),
            given=vocabulary.names(np.flatnonzero(part.found.truth[row])),
            jpeg=thumbnails(part.split.source)(row),
        )

    page = pages.render_suspects(
        [shown(image) for image in dict.fromkeys(found.rows.tolist())],
        title=runs[0].data.directory.name,
        run="; ".join(run.name for run in runs),
        provenance=provenance,
        num_found=num_found,
    )
    write_text(sheet, page)


def _say_predicted(
    runs: Sequence[Run], parts: Sequence[_Part], workdir: Workdir
) -> None:
    data = runs[0].data
    images = sum(
        data.split(name).num_examples for name in HOME_SPLITS if data.has_images(name)
    )
    predicted = sum(len(part.known) for part in parts)
    say(f"predicted {predicted} of {images} training images, each by runs without it")
    if predicted < images:
        say(f"          hold_out --workdir={workdir.path} --folds=4 covers the others")
