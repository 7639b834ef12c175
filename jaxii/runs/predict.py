"""`predict`: labels images on disk; needs only a workdir."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from jaxii.console import progress, say, warn
from jaxii.data.labels import Vocabulary
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation import image_records, predictions
from jaxii.evaluation.image_records import ImageFiles, Listing, thumbnails
from jaxii.evaluation.predictions import Answer, ExpectedF2, Facts
from jaxii.evaluation.result import EvaluationResult
from jaxii.models.multitask import EMBEDDING_HEAD
from jaxii.runs import assembly, unseen
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
    """The number of damaged images, and the first `MOST_NAMED` of them."""

    count: int = 0
    first: list[Answer] = field(default_factory=list[Answer])

    def watch(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Yields the answers; raises InputError at the end if all are damaged."""
        total = 0
        for given in answers:
            total += 1
            if given.fault:
                self.count += 1
                if len(self.first) < MOST_NAMED:
                    self.first.append(given)
            yield given
        if self.count == total:
            raise InputError(
                f"none of the {total} images can be read (the first: "
                f"{self.first[0].fault}), so nothing was written; use readable images."
            )


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
    processes.check_same(found.digest(), "the images are different")
    with ExitStack() as opened:
        run = opened.enter_context(Run.open(workdir.path, metrics.stage))
        members = run.members(options)
        for other in members[1:]:
            opened.enter_context(other)
        check_same_runs(members)
        check_same_evaluation(workdir, variants)
        _check_members(members, metrics, options)
        files = assembly.image_files(run.config, found, metrics.short_side_pixels)
        models = [member.model() for member in members]
        decoders = run.load_decoders(variants)
        decoder = decoder or metrics.decoder.name
        has_head = EMBEDDING_HEAD in models[0].params and len(models) == 1
        decoders.check(decoder, decoders.names(has_head=has_head))
        error = unseen.expected_f2_error(metrics.held_out, options, decoder)
        expected = ExpectedF2(decoders, decoder, error)
        facts = _facts(found.source, members, metrics, options, expected)
    request.check_places()
    home = workdir.path, metrics.num_domains
    unseen.say_caveats(facts.provenance, metrics.held_out, options, decoder, *home)
    target = partial(assembly.unlabelled_batches, run.config, files)
    damaged = Damaged()
    with progress() as on_progress:
        answers = predictions.answer(
            options.make_predict(models, run.mesh, target, decoders),
            assembly.file_batches(run.config, files),
            num_rows=len(files),
            decode=expected.decode,
            # Only the lead process finds reasons, by reading the file again.
            fault=files.fault if processes.is_lead() else lambda row: "damaged",
            mesh=run.mesh,
            on_progress=on_progress,
        )
        _write(request, files, damaged.watch(answers), workdir.vocabulary(), facts)
    _say(request, files, damaged, facts)
    say(unseen.expected_f2_line(expected, *home))


def _write(
    request: Request,
    files: ImageFiles,
    answers: Iterable[Answer],
    vocabulary: Vocabulary,
    facts: Facts,
) -> None:
    """Writes the requested files in one pass over the answers."""
    output, image_ids = request.output, files.listing.image_ids
    sheet = None
    if request.sheet is not None and processes.is_lead():
        # Imported here: the pages take most of a second to import.
        from jaxii.report.sheet import Sheet

        sheet = Sheet(len(files), files.listing.shown, vocabulary, thumbnails(files))
        answers = sheet.watch(answers)
    if output is None or not processes.is_lead():
        for _ in answers:
            pass
    elif request.is_submission:
        constant = predictions.fallback_labels(facts.constant, vocabulary)
        labels = (constant if given.fault else given.label_ids for given in answers)
        predictions.write_submission(
            output, image_ids, labels, vocabulary, facts.record
        )
    else:
        names = files.listing.names
        predictions.write_json_lines(
            output, image_ids, names, answers, vocabulary, facts
        )
    if request.sheet is not None and sheet is not None:
        sheet.write(request.sheet, facts)


def _say(request: Request, files: ImageFiles, damaged: Damaged, facts: Facts) -> None:
    for given in damaged.first:
        warn(f"damaged  {files.listing.shown(given.row)}: {given.fault}")
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
    names = [member.name for member in members]
    if options.ensemble and names != metrics.members:
        raise InputError(
            f"thresholds were chosen for the mean of {'; '.join(metrics.members)}, not "
            f"of {'; '.join(names)}; run evaluate with the same --ensemble first."
        )
    members[0].check_evaluated(metrics)


def _facts(
    source: str,
    members: Sequence[Run],
    metrics: EvaluationResult,
    options: InferenceOptions,
    expected: ExpectedF2,
) -> Facts:
    own = members[0]
    record = metrics.provenance.union(own.provenance)
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
