"""`predict`: labels images on disk; needs only a workdir."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxii.console import progress, say, warn
from jaxii.data.labels import Vocabulary
from jaxii.data.pipeline import Reordered
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import image_records, predictions
from jaxii.evaluation.draft import FORMAT, Draft, State, open_draft
from jaxii.evaluation.image_records import ImageFiles, Listing, thumbnails
from jaxii.evaluation.predictions import Answer, ExpectedF2, Facts
from jaxii.evaluation.predictor import Predict
from jaxii.evaluation.provenance import Provenance
from jaxii.evaluation.result import EvaluationResult
from jaxii.models.multitask import EMBEDDING_HEAD
from jaxii.runs import agreement, assembly, unseen
from jaxii.runs.agreement import check_same_evaluation, check_same_runs
from jaxii.runs.inference import InferenceOptions
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, check_writable

# Name of the predicted images in a provenance.
IMAGES = "predicted"
# Largest number of damaged images that are named on stderr.
MOST_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """The images to predict, and the files to write.

    Attributes:
      images: A folder, a CSV, or images; see `image_records.find`.
      more: Further images.
      ids: A sample submission with the ids to predict, in order; None for all images.
      output: The CSV or JSON lines file to write; None for none.
      sheet: The contact sheet to write; None for none.
    """

    images: str
    more: tuple[str, ...] = ()
    ids: AnyPath | None = None
    output: AnyPath | None = None
    sheet: AnyPath | None = None

    @property
    def is_submission(self) -> bool:
        """Whether `output` is a CSV, whose rows are identified by image id alone."""
        return self.output is not None and self.output.suffix == ".csv"

    def find(self) -> Listing:
        """Finds the images.

        Raises:
          InputError: If an image cannot be used, or two images have one id.
        """
        found = image_records.find(self.images, self.more)
        if self.ids is not None:
            return found.select(image_records.read_ids(self.ids))
        if self.is_submission:
            found.check_ids()
            if found.paths_as_ids:
                say(f"CAVEAT     the image id is the {found.paths_as_ids}")
        return found

    def check_places(self) -> None:
        """Checks that the files can be written; creates their folders."""
        for path in filter(None, (self.output, self.sheet)):
            check_writable(path)


@dataclass
class Damaged:
    """The number of damaged images, and rows and faults of the first `MOST_NAMED`."""

    num_rows: int = 0
    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yields the answers; raises InputError at the end if all are damaged."""
        for given in answers:
            self.num_rows += 1
            if given.fault:
                self.count += 1
                if len(self.first) < MOST_NAMED:
                    self.first.append((given.row, given.fault))
            yield given
        if self.count == self.num_rows:
            raise InputError(
                f"none of the {self.num_rows} images can be read (the first: "
                f"{self.first[0][1]}), so nothing was written; use readable images."
            )


@dataclass(frozen=True)
class Totals:
    """The sums over the images that are predicted."""

    damaged: Damaged
    expected: ExpectedF2

    def state(self) -> State | None:
        """Returns the sums as JSON; None while no image could be read."""
        if self.damaged.count == self.damaged.num_rows:
            return None
        expected = self.expected.total, self.expected.num_images
        return {"damaged": asdict(self.damaged), "expected_f2": expected}

    def restore(self, draft: Draft | None) -> int:
        """Continues with the sums of a draft; returns the first row to predict.

        Only the lead process has a draft.
        """
        if draft is not None and draft.found:
            damaged = draft.found["damaged"]
            self.damaged.count = damaged["count"]
            self.damaged.first = [(row, fault) for row, fault in damaged["first"]]
            self.expected.total, self.expected.num_images = draft.found["expected_f2"]
        kept = np.int32(draft.num_rows if draft else 0)
        first_row = int(multihost_utils.broadcast_one_to_all(kept))
        # A draft has an image that could be read.
        self.damaged.num_rows = first_row
        return first_row


def predict(
    workdir: Workdir,
    *,
    request: Request,
    decoder: str,
    options: InferenceOptions,
    tune_on: str = "",
) -> None:
    """Writes the labels of every image.

    Args:
      workdir: The workdir of an evaluated run.
      request: The images to predict, and the files to write.
      decoder: Name of the decoder; "" for the one that `evaluate` used.
      options: Changes to the model, which adapts to the predicted images.
      tune_on: `--tune_on` of the evaluation whose decoders to use; "" for its default.
    """
    # The model adapts to these images, so adaptations in `evaluate` do not matter.
    variants = workdir.tuned_on(tune_on) + ["ensemble"] * bool(options.ensemble)
    metrics = workdir.metrics(variants)
    found = request.find()
    digest = found.digest()
    processes.check_same(digest, "the images are different")
    with ExitStack() as opened:
        run = opened.enter_context(Run.open(workdir.path, metrics.stage))
        members = run.members(options)
        for other in members[1:]:
            opened.enter_context(other)
        check_same_runs(members)
        check_same_evaluation(workdir, variants)
        _check_members(members, metrics, options)
        files = assembly.image_files(run.config, found, run.short_side_pixels)
        models = [member.model() for member in members]
        decoders = run.load_decoders(variants)
        decoder = decoder or metrics.decoder.name
        has_head = EMBEDDING_HEAD in models[0].params and len(models) == 1
        decoders.check(decoder, decoders.names(has_head=has_head))
        error = unseen.expected_f2_error(metrics, options, decoder)
        expected = ExpectedF2(decoders, decoder, error)
        facts = _facts(found.source, members, metrics, options, expected)
        size = assembly.file_batch_size(run.config, len(files))
        words = _words(request, found, options, decoder, run, size)
        identity = agreement.identity(members, workdir, variants, *words)
        workdir.check_current(metrics, variants)
    request.check_places()
    home = workdir.path, metrics.num_domains
    unseen.say_caveats(facts.provenance, metrics.held_out, options, decoder, *home)
    target = partial(assembly.unlabelled_batches, run.config, files)
    make_predict = partial(options.make_predict, models, run.mesh, target, decoders)
    totals = Totals(Damaged(), expected)
    _answer(run, request, files, make_predict, totals, identity, facts, size)
    _say(request, files, totals.damaged, facts)
    say(unseen.expected_f2_line(expected, *home))


def _answer(
    run: Run,
    request: Request,
    files: ImageFiles,
    make_predict: Callable[[], Predict],
    totals: Totals,
    identity: str,
    facts: Facts,
    size: int,
) -> None:
    """Predicts the images that no draft of the output has, and writes the files.

    Args:
      size: Images in a batch. That of all images, so that each is in the same batch as
        without a draft.
    """
    with _draft(request, identity, totals, files, size) as draft:
        first_row = totals.restore(draft)
        rest = Reordered(files, np.arange(first_row, len(files)))
        with progress() as on_progress:
            answers = predictions.answer(
                make_predict(),
                assembly.file_batches(run.config, rest, size),
                num_rows=len(files),
                first_row=first_row,
                decode=totals.expected.decode,
                # Only the lead process finds reasons, by reading the file again.
                fault=files.fault if processes.is_lead() else lambda row: "damaged",
                mesh=run.mesh,
                on_progress=on_progress,
            )
            answers = totals.damaged.watch(answers)
            _write(request, files, answers, run.vocabulary, facts, draft)


def _words(
    request: Request,
    found: Listing,
    options: InferenceOptions,
    decoder: str,
    run: Run,
    global_batch_size: int,
) -> list[str]:
    """Returns what decides the answers besides the checkpoints and the evaluation.

    Args:
      found: The images to predict.
      global_batch_size: Images in a batch.
    """
    device = run.mesh.devices.flat[0].device_kind
    # The digest has only the names in the folder. Paths of buckets are absolute.
    folder = found.folder
    folder = folder.absolute() if isinstance(folder, Path) else folder
    batch = f"batches of {global_batch_size}"
    return [
        f"format {FORMAT}, JAX {jax.__version__}",
        f"{run.mesh.size} x {device}, {batch}",
        f"{options} {decoder}",
        f"submission: {request.is_submission}",
        f"images in {folder}",
        found.digest(),
    ]


@contextmanager
def _draft(
    request: Request, identity: str, totals: Totals, files: ImageFiles, size: int
) -> Generator[Draft | None, None, None]:
    """Holds the output, and yields its draft on the lead process.

    Raises:
      InputError: On every process, if another command writes the output.
    """
    drafts: list[Draft] = []
    with ExitStack() as opened:

        def open_it() -> None:
            if request.output is not None:
                draft = open_draft(
                    request.output,
                    # A contact sheet needs all answers.
                    "" if request.sheet else identity,
                    state=totals.state,
                    batch_size=size,
                    num_rows=len(files),
                )
                drafts.append(opened.enter_context(draft))

        processes.check_on_lead(open_it)
        for draft in drafts:
            if draft.num_rows:
                say(
                    f"continues after {draft.num_rows} of {len(files)} images; if one "
                    f"of them has changed, remove {draft.folder} first"
                )
        yield drafts[0] if drafts else None


def _write(
    request: Request,
    files: ImageFiles,
    answers: Iterable[Answer],
    vocabulary: Vocabulary,
    facts: Facts,
    draft: Draft | None,
) -> None:
    """Writes the requested files in one pass over the answers."""
    output, image_ids = request.output, files.listing.image_ids
    sheet = None
    if request.sheet is not None and processes.is_lead():
        # Imported here: the pages take most of a second to import.
        from jaxii.report.sheet import Sheet

        sheet = Sheet(len(files), files.listing.shown, vocabulary, thumbnails(files))
        answers = sheet.watch(answers)
    if output is None or draft is None:
        for _ in answers:
            pass
    elif request.is_submission:
        constant = predictions.fallback_labels(facts.constant, vocabulary)
        labels = (constant if given.fault else given.label_ids for given in answers)
        predictions.write_submission(
            output, image_ids, labels, vocabulary, facts.record, draft
        )
    else:
        names = files.listing.names
        predictions.write_json_lines(
            output, image_ids, names, answers, vocabulary, facts, draft
        )
    if request.sheet is not None and sheet is not None:
        sheet.write(request.sheet, facts)


def _say(request: Request, files: ImageFiles, damaged: Damaged, facts: Facts) -> None:
    for row, fault in damaged.first:
        warn(f"damaged  {files.listing.shown(row)}: {fault}")
    told_all = request.output is not None and not request.is_submission
    if damaged.count > len(damaged.first):
        where = f"{request.output} lists" if told_all else "--output=FILE.jsonl lists"
        more = damaged.count - len(damaged.first)
        warn(f"damaged  and {more} more; {where} all of them, with the reasons")
    text = f"{len(files)} images, {damaged.count} of them damaged"
    if damaged.count and request.is_submission:
        text += (
            " (predicted as the most frequent labels: "
            f"{predictions.shortened(facts.constant_names)})"
        )
    say(
        f"{text}; decoder {facts.decoder_words}; provenance: {facts.provenance.badge()}"
    )
    for what, path in (("answers", request.output), ("sheet", request.sheet)):
        if path is not None:
            say(f"{what:8} {path}")


def _check_members(
    members: Sequence[Run], metrics: EvaluationResult, options: InferenceOptions
) -> None:
    """Raises InputError if the decoders were fitted on other checkpoints."""
    # Hashes, because a path names another checkpoint once the run is trained again.
    hashes = sorted(member.checkpoint_hash for member in members)
    if options.ensemble and hashes != sorted(metrics.member_hashes):
        names = "; ".join(member.name for member in members)
        raise InputError(
            f"the thresholds were chosen on {metrics.created} for the mean of "
            f"{'; '.join(metrics.members)}; the checkpoints to use, {names}, are not "
            "the same; run evaluate with the same --ensemble first."
        )
    members[0].check_evaluated(metrics)


def _facts(
    source: str,
    members: Sequence[Run],
    metrics: EvaluationResult,
    options: InferenceOptions,
    expected: ExpectedF2,
) -> Facts:
    records = (member.provenance for member in members)
    record = reduce(Provenance.union, records, metrics.provenance)
    return Facts(
        source=source,
        run="; ".join(member.name for member in members),
        provenance=options.provenance(record, [IMAGES], [IMAGES]),
        constant=metrics.constant.labels,
        constant_names=metrics.constant.names,
        decoder=expected.name,
        parameter=expected.decoders.parameter(expected.name),
        expected_f2=expected,
    )
