"""`begin`: checks a run before training, claims its workdir and assembles it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import numpy as np

from jaxii.config import Config
from jaxii.console import say
from jaxii.data import label_embedding
from jaxii.data.prepared import Data
from jaxii.data.seen import Hashes, SeenImages, hashes_of
from jaxii.distributed import processes
from jaxii.errors import InputError
from jaxii.evaluation.provenance import Provenance, provenance_by_stage
from jaxii.evaluation.result import hardware
from jaxii.models.pretrained import Trunk, check_stem_of_files, load_trunk
from jaxii.runs import assembly
from jaxii.runs.agreement import check_same_checkpoints, check_same_runs
from jaxii.runs.run import Run
from jaxii.runs.start_point import StartPoint, check_same_trunk
from jaxii.runs.workdir import CHANGE_BATCH_SIZE, Workdir
from jaxii.storage import at
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import BatchSize, Done, Saved, next_action

# Number of labels shown, as a check by eye, and of the neighbours shown for each.
NEIGHBOURS = 3


def begin(
    config: Config,
    workdir: Workdir,
    *,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
    verify: bool = False,
) -> Run:
    """Assembles a new or resumed run.

    Writes to the workdir only after all checks. A damaged history is then renamed, and
    a new one begins.

    Args:
      workdir: A new folder, or one of the same configuration.
      allow_tuning_labels: Whether weights may learn from labels of `tuning`, in this
        run or in the run that it starts from.
      change_batch_size: Whether a resumed run may have another batch size.
      verify: Whether to hash every byte of the data first.

    Raises:
      InputError: If a check fails, labels of `tuning` are used but not allowed, or the
        checkpoints differ between processes.
    """
    data = assembly.open_data(config, verify=verify)
    for split in (data.choosing_split, "validation"):
        data.check_truth(split)
    workdir.check_labels(data.vocabulary)
    label_hash = data.vocabulary.content_hash()
    parts = config.content_hash() + data.content_hash + label_hash
    digest = hashlib.sha256(parts.encode()).hexdigest()
    processes.check_same(digest, "the recipe or dataset is different")
    names = [stage.name for stage in config.stages]
    check_same_checkpoints(workdir, names)
    checkpoints = Checkpoints(workdir.path, names, label_hash)
    run = Run(workdir, config, checkpoints, data=data)
    begun = checkpoints.saved().get(names[0])
    _check_begun(run)
    if not begun:
        run.start = _start(run, label_hash)
    record = _record(run, begun)
    run.stage_provenance = provenance_by_stage(
        record, [plan.stage for plan in run.plans], data.choosing_split
    )
    if not allow_tuning_labels:
        _check_no_tuning_labels(run.stage_provenance[names[-1]])
    run.batch_sizes = _batch_sizes(run, change_batch_size=change_batch_size)
    if begun:
        _check_same_images(run)
    else:
        _check_same_start(run)
    if processes.is_lead():
        workdir.claim_labels(data.vocabulary)
        workdir.claim(config, change_batch_size=change_batch_size)
        _set_damaged_history_aside(run)
        if not begun:
            _write_start(run)
    processes.wait_for_all("workdir")
    return run


def describe(run: Run) -> list[str]:
    """Returns the lines shown before a run: data, embedding, length."""
    rows = [f"data      {in_words(run.data)}"]
    rows += [f"          {line}" for line in _left_out(run)]
    made = run.label_embedding
    if made is not None:
        rows.append(
            f"embedding {made.vectors.shape[1]} dimensions per label, "
            f"{made.explained_energy:.1%} of the energy of the PMI matrix"
        )
        rows += [f"          {line}" for line in _neighbours(run, made)]
    steps = sum(plan.stage.num_steps for plan in run.plans)
    rows.append(
        f"run       {run.workdir.path}: {len(run.plans)} stages, {steps} steps "
        f"of {run.config.global_batch_size} images on {hardware()}"
    )
    if isinstance(run.start, Run):
        rows.append(f"start     {StartPoint.of(run.start, run.config)}")
    elif isinstance(run.start, Trunk):
        rows.append(f"start     trunk from {run.start.origin}")
        if run.start.left_out:
            rows.append(
                f"          {run.start.left_out} not used: the file does not name "
                "the labels of its rows"
            )
    caveats = run.stage_provenance[run.config.stages[-1].name].caveats()
    return [f"CAVEAT    {caveat}" for caveat in caveats] + rows


def in_words(data: Data) -> str:
    """Returns where the data is, its number of labels, and its images by split."""
    counts = ", ".join(f"{n} {s.num_examples}" for n, s in data.splits.items())
    return f"{data.directory}: {len(data.vocabulary)} labels; images: {counts}"


def _check_begun(run: Run) -> None:
    """Checks that a resumed run belongs to its checkpoints.

    Raises:
      InputError: If a file of the run is damaged, or the dataset is another one.
    """
    latest, workdir, data = run.checkpoints.latest(), run.workdir, run.data
    if latest is None:
        return
    metadata = run.checkpoints.metadata(latest)
    workdir.check_belongs(metadata)
    if metadata.data_hash != data.content_hash:
        raise InputError(
            f"{workdir.path} was trained on a dataset with hash {metadata.data_hash}, "
            f"but {data.directory} has hash {data.content_hash}; pass the dataset it "
            "was trained on as --data_dir (in Python: config.data.directory), or use "
            "another --workdir."
        )


def _check_config(run: Run, *, change_batch_size: bool) -> None:
    """Checks that the workdir is new or of the run's configuration.

    Raises:
      InputError: If it is not. A run that has finished keeps its batch size.
    """
    stages, saved = [plan.stage for plan in run.plans], run.checkpoints.saved()
    otherwise = CHANGE_BATCH_SIZE
    if isinstance(next_action(stages, saved), Done):
        change_batch_size = False
        otherwise = "; the run has finished, so its batch size can no longer change"
    run.workdir.check(
        run.config, change_batch_size=change_batch_size, otherwise=otherwise
    )


def _batch_sizes(run: Run, *, change_batch_size: bool) -> tuple[BatchSize, ...]:
    """Checks the workdir's configuration and returns the batch sizes of all updates.

    Empty if the run never changes its batch size.
    """
    _check_config(run, change_batch_size=change_batch_size)
    latest, config = run.checkpoints.latest(), run.config
    if latest is None:
        return ()
    metadata = run.checkpoints.metadata(latest)
    now = BatchSize(latest.step, config.global_batch_size, config.micro_batches)
    before = metadata.all_batch_sizes()
    return metadata.batch_sizes if before[-1][1:] == now[1:] else (*before, now)


def _check_no_tuning_labels(last: Provenance) -> None:
    """Raises InputError if a run would learn from labels of the target domain."""
    if last.uses_target_labels:
        raise InputError(
            f"this run would learn from labels of the target domain "
            f"({last.badge()}); add --allow_tuning_labels to allow this "
            "(in Python: allow_tuning_labels=True)."
        )


def _check_same_images(run: Run) -> None:
    """Checks that a resumed run continues on the images that it began with.

    Earlier versions also trained on images without a label. Not checked for a run that
    started from another one, whose images its file also holds.

    Raises:
      InputError: If the run began with other images.
    """
    other = run.config.start_from or run.workdir.start_file.exists()
    if other or not run.data.num_unlabelled:
        return
    before = SeenImages.load(run.workdir.seen_file).by_part["weights"]
    now = _image_hashes(run.data, {stage.split for stage in run.config.stages})
    if not np.array_equal(before, now):
        raise InputError(
            f"{run.workdir.path} was trained on {len(before)} images by an earlier "
            f"version of jaxii, but training now uses {len(now)}, because it leaves "
            "out images without a label; train again in another --workdir."
        )


def _check_same_start(run: Run) -> None:
    """Checks that a run without a checkpoint starts from the same one as before.

    Raises:
      InputError: On every process, if it started from another one.
    """
    if isinstance(run.start, Run):
        point = StartPoint.of(run.start, run.config)
        processes.check_on_lead(lambda: point.check_same(run.workdir))


def _set_damaged_history_aside(run: Run) -> None:
    latest = run.checkpoints.latest()
    if latest is None:
        return
    metadata = run.checkpoints.metadata(latest)
    if fault := run.workdir.history_fault(metadata.history):
        aside = run.workdir.set_history_aside()
        say(
            f"CAVEAT    {fault}; a damaged history is kept as {aside.name}, and the "
            "training curves start over"
        )


def _write_start(run: Run) -> None:
    """Writes the start, the label embedding, and hashes of the images to learn from.

    Replaces the files of an earlier start that saved no checkpoint, perhaps on other
    data. The hashes include those of the run that this run starts from.
    """
    workdir, data = run.workdir, run.data
    splits = {
        "weights": {stage.split for stage in run.config.stages},
        "model_selection": {data.choosing_split},
    }
    seen = SeenImages(
        {part: _image_hashes(data, names) for part, names in splits.items()}
    )
    workdir.start_file.unlink(missing_ok=True)
    if isinstance(run.start, Run):
        StartPoint.of(run.start, run.config).save(workdir)
        seen = seen.union(SeenImages.load(run.start.workdir.seen_file))
    seen.save(workdir.seen_file)
    workdir.embedding_file.unlink(missing_ok=True)
    if any(stage.embedding_head for stage in run.config.stages):
        provenance = {
            "split": "train",
            "num_images": data.split("train").num_examples,
            "label_hash": data.vocabulary.content_hash(),
            "options": run.config.to_dict()["label_embedding"],
        }
        made = assembly.make_label_embedding(run.config, data)
        label_embedding.save(workdir.embedding_file, made, provenance=provenance)


def _image_hashes(data: Data, names: Iterable[str]) -> Hashes:
    """Returns the hashes of all images of some splits."""
    return hashes_of(data.split(name).index for name in names)


def _start(run: Run, label_hash: str) -> Run | Trunk | None:
    """Opens the weights that the first stage starts from, and checks that they fit."""
    config, init = run.config, run.plans[0].init
    pretrained = config.model.pretrained
    if pretrained and not at(pretrained).is_dir():
        check_stem_of_files(config.model.variant, config.model.stem)
        shapes = jax.eval_shape(init, jax.random.key(0))
        trunk = load_trunk(pretrained, *shapes)
        processes.check_same(trunk.digest, f"{pretrained} is a different file")
        return trunk
    if pretrained:
        start = Run.open(pretrained)
        check_same_runs([start])
        check_same_trunk(start, config)
        start.weights.trunk().check_fits(init)
    elif config.start_from:
        stage = config.start_from_stage
        start = Run.open(config.start_from, stage, label_hash=label_hash)
        check_same_runs([start])
        start.check_same_data(config)
        start.weights.check_fits(init)
        check_same_trunk(start, config)
    else:
        return None
    return start


def _record(run: Run, begun: Sequence[Saved] | None) -> Provenance:
    """Returns the provenance of the run before its stages are added."""
    if begun:
        return Provenance.from_json(run.checkpoints.metadata(begun[0]).provenance)
    data, start = run.data, run.start
    record = Provenance(
        label_hash=data.vocabulary.content_hash(), datasets=(data.content_hash,)
    )
    if isinstance(start, Run) and run.config.start_from:
        record = start.provenance_on(data).union(record)
    elif isinstance(start, Run):
        # The heads, and with them the labels of the other run, are left out.
        past = start.provenance_on(data, same_splits=False)
        record = replace(past, label_hash="").union(record)
    elif start is not None:
        record = replace(record, pretrained=start.origin)
    return replace(record, one_batch=record.one_batch or run.config.data.reuse_batch)


def _left_out(run: Run) -> list[str]:
    """Returns the images and labels that do not train, and images not scored."""
    data, most = run.data, run.config.data.most_labels
    splits = dict.fromkeys(stage.split for stage in run.config.stages)
    rows: list[str] = []
    if data.num_unlabelled and "train" in splits:
        rows.append(
            f"{data.num_unlabelled} training images have no label that training uses "
            f"(machine_labels is {run.config.data.machine_labels!r}) and are left out"
        )
    for split in splits:
        cut = int(np.sum(np.diff(data.training_rows(split).offsets) > most))
        if cut:
            rows.append(
                f"{cut} training images of {split} have more than {most} labels; "
                "training ignores the extra labels, evaluation uses all"
            )
    for split in dict.fromkeys((data.choosing_split, "validation", "test")):
        without = data.without_truth(split) if data.has_truth(split) else 0
        if without:
            rows.append(
                f"{without} of {data.split(split).num_examples} images of {split} have "
                "no verified label and are excluded from all metrics"
            )
    return rows


def _neighbours(run: Run, made: label_embedding.LabelEmbedding) -> list[str]:
    """Returns lines with the nearest labels of the labels with the longest vectors.

    Long vectors say most about which labels occur together. The most frequent labels
    occur with all others, and their vectors have almost no direction of their own.
    """
    vocabulary = run.data.vocabulary
    lengths = np.linalg.norm(made.vectors, axis=1)
    rows: list[str] = []
    for label in np.argsort(-lengths, kind="stable")[:NEIGHBOURS]:
        near = label_embedding.nearest(made.vectors, int(label), NEIGHBOURS)
        names = ", ".join(vocabulary.names([other for other, _ in near]))
        rows.append(
            f"{vocabulary.descriptions[label]}: nearest labels {names or 'none'}"
        )
    return rows
