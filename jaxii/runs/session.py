"""A run's folder opened together with its data: what `train` and `evaluate` work on.

Comes after the configuration is checked and before anything is trained or measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxii.config import Config
from jaxii.console import progress, say
from jaxii.data import label_embedding
from jaxii.data.seen import SeenImages, hashes_of
from jaxii.distributed import processes
from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.errors import InputError
from jaxii.evaluation.evaluator import Evaluator
from jaxii.evaluation.provenance import Provenance, provenance_by_stage
from jaxii.evaluation.result import hardware
from jaxii.models.pretrained import Trunk
from jaxii.runs import assemble, networks
from jaxii.runs.trained import Trained, open_trained
from jaxii.runs.workdir import Workdir
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.stages import Stage
from jaxii.train.trainer import StagePlan

# How many labels are shown with how many of their neighbours, as a check by eye.
NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Session:
    """A workdir opened together with its data, ready to train or to be evaluated.

    Attributes:
      workdir: of the run.
      config: of the run.
      data: opened.
      label_embedding: None where no stage has a head for it.
      plans: the stages in order.
      mesh: the devices.
      checkpoints: of the run.
      start: from which the first stage is to start: another run's checkpoint, or
        pretrained weights of its trunk.
      provenance: stage name -> what its checkpoints say, or will.
      history_fault: why the figures by step cannot be shown; "" if they can.
    """

    workdir: Workdir
    config: Config
    data: assemble.Data
    label_embedding: label_embedding.LabelEmbedding | None
    plans: tuple[StagePlan, ...]
    mesh: jax.sharding.Mesh
    checkpoints: Checkpoints
    start: Trained | Trunk | None
    provenance: Mapping[str, Provenance]
    history_fault: str

    def evaluator(self) -> Evaluator:
        """Returns the evaluator of the run's labels."""
        return Evaluator(
            mesh=self.mesh,
            num_classes=len(self.data.vocabulary),
            label_embeddings=self.vectors(),
        )

    def vectors(self) -> jax.Array | None:
        """Returns the label embeddings on the devices, [class, embed]."""
        if self.label_embedding is None:
            return None
        return jax.device_put(self.label_embedding.vectors, replicated(self.mesh))

    def plan(self, stage: str) -> StagePlan:
        """Returns a stage's plan by name."""
        return next(plan for plan in self.plans if plan.stage.name == stage)

    def metadata(self, recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns stage name -> what its checkpoints say of the run they belong to.

        Args:
          recipe: what the configuration came of; see `train`.
        """
        run = {
            "config_hash": self.config.content_hash(),
            "config": self.config.to_dict(),
            "recipe": dict(recipe),
            "data_hash": self.data.content_hash,
            "files": self.workdir.own_files(),
        }
        return {
            stage: {"provenance": provenance.to_json(), **run}
            for stage, provenance in self.provenance.items()
        }

    def held_out_figures(self, stage: str) -> dict[str, Any]:
        """Returns domain -> figures of a stage on it, of the runs that held it out.

        Empty unless that was done with every domain: the mean over some of them would
        be another estimate than the one over all.
        """
        found = {
            domain: metrics["splits"]["held_out"]
            for domain, metrics in self.workdir.held_out_metrics().items()
            if metrics["stage"] == stage
        }
        return found if set(found) == set(self.data.domains) else {}

    def verified_absent(self, split: str) -> bool:
        """Says whether people verified what is not in a split's images."""
        return bool(np.any(self.data.verified_rows(split).confidences < 0.5))


def open_session(
    config: Config,
    workdir: Workdir,
    *,
    claim: bool = True,
    allow_tuning_labels: bool = False,
    change_batch_size: bool = False,
    verify: bool = False,
) -> Session:
    """Opens the data and assembles the run.

    Args:
      config: checked.
      workdir: of the run; its labels have to be the data's.
      claim: make the workdir this configuration's, or check that it is; to train.
      allow_tuning_labels: let weights be trained that have learnt from labels of
        `tuning`, in this run or before it.
      change_batch_size: let a run go on with batches of another size.
      verify: read and hash every byte of the data first.

    Raises:
      InputError: whatever cannot be opened, and labels of `tuning` not allowed.
    """
    data = _open_data(config, verify)
    plans = _plans(config, data)
    stages = [plan.stage for plan in plans]
    workdir.check_labels(data.vocabulary)
    label_hash = data.vocabulary.content_hash()
    checkpoints = Checkpoints(
        workdir.path, [s.name for s in stages], label_hash, read_only=not claim
    )
    begun = checkpoints.saved().get(stages[0].name)
    history_fault = _check_begun(workdir, checkpoints, data, claim)
    start = _start(config, plans[0], label_hash) if claim and not begun else None
    record = _record(config, checkpoints, begun, start, data)
    provenance = provenance_by_stage(record, stages, data.choosing_split)
    if claim and not allow_tuning_labels:
        _refuse_tuning_labels(provenance[stages[-1].name])
    # Nothing is written before everything that can be refused has been checked.
    if claim:
        workdir.check(config, change_batch_size=change_batch_size)
    if processes.is_lead():
        workdir.claim_labels(data.vocabulary)
        if claim:
            workdir.claim(config, change_batch_size=change_batch_size)
        if claim and not begun:
            _begin(workdir, data, stages, start)
    return Session(
        workdir=workdir,
        config=config,
        data=data,
        label_embedding=_label_embedding(config, data, workdir, stages),
        plans=plans,
        mesh=make_mesh(),
        checkpoints=checkpoints,
        start=start,
        provenance=provenance,
        history_fault=history_fault,
    )


def _open_data(config: Config, verify: bool) -> assemble.Data:
    """Opens the data; refuses it where evaluation has no image to score."""
    with progress() as on_progress:

        def open_verified() -> None:
            assemble.open_data(config, on_progress, verify=True)

        if verify:
            # One process reads for all.
            processes.check_on_lead(open_verified)
        data = assemble.open_data(config, on_progress)
    for split in (data.choosing_split, "validation"):
        data.check_truth(split)
    return data


def _check_begun(
    workdir: Workdir, checkpoints: Checkpoints, data: assemble.Data, claim: bool
) -> str:
    """Refuses to go on with what is not the run that was begun.

    Returns:
      Why the history cannot be shown; a run that goes on begins another one.

    Raises:
      InputError: If a file of the run is damaged, or it is to train on other data.
    """
    latest = checkpoints.latest()
    if latest is None:
        return ""
    metadata = checkpoints.metadata(latest)
    workdir.check_belongs(metadata)
    if claim and metadata["data_hash"] != data.content_hash:
        raise InputError(
            f"{workdir.path} was trained on another dataset (hash "
            f"{metadata['data_hash']}) than that of {data.directory} (hash "
            f"{data.content_hash}); give the dataset it was trained on with "
            "--data_dir, or another --workdir."
        )
    fault = workdir.history_fault(metadata)
    if not fault or not claim:
        return fault
    if processes.is_lead():
        aside = workdir.set_history_aside()
        say(f"CAVEAT    {fault}: it is now {aside.name}, and curves begin anew")
    return ""


def _begin(
    workdir: Workdir,
    data: assemble.Data,
    stages: Sequence[Stage],
    start: Trained | Trunk | None,
) -> None:
    """Keeps which images the run learns from, and those of the run it starts from.

    What an earlier start left that came to no checkpoint, perhaps on other data, goes.
    """
    workdir.embedding_file.unlink(missing_ok=True)
    splits = {
        "weights": {stage.split for stage in stages},
        "model_selection": {data.choosing_split},
    }
    seen = SeenImages(
        {
            part: hashes_of(
                image_id
                for name in sorted(names)
                for image_id in data.split(name).index.image_ids
            )
            for part, names in splits.items()
        }
    )
    if isinstance(start, Trained):
        seen = seen.union(SeenImages.load(start.workdir.seen_file))
    seen.save(workdir.seen_file)


def _plans(config: Config, data: assemble.Data) -> tuple[StagePlan, ...]:
    stages = assemble.stages_of(config, lambda split: data.split(split).num_examples)
    dim = 0
    if any(stage.embedding_head for stage in stages):
        assemble.check_label_embedding(config, data)
        dim = config.label_embedding.dim
    return assemble.make_plans(
        config, networks.make_networks(config, data, dim), stages
    )


def _start(config: Config, plan: StagePlan, label_hash: str) -> Trained | Trunk | None:
    if not config.start_from:
        trunk = networks.pretrained_trunk(config, plan.init)
        if trunk is not None:
            other = f"{config.model.pretrained} is another file"
            processes.check_same(trunk.digest, other)
        return trunk
    start = open_trained(
        config.start_from, config.start_from_stage, label_hash=label_hash
    )
    start.check_same_data(config)
    start.check_start_of(jax.eval_shape(plan.init, jax.random.key(0))[0])
    return start


def _record(config, checkpoints, begun, start, data) -> Provenance:
    """Returns what the run knew of its past before its first stage."""
    if begun:
        return Provenance.from_json(checkpoints.metadata(begun[0])["provenance"])
    record = Provenance(
        label_hash=data.vocabulary.content_hash(), datasets=(data.content_hash,)
    )
    match start:
        case Trained():
            record = start.provenance_on(data).union(record)
        case Trunk():
            record = replace(record, pretrained=start.origin)
    return replace(record, one_batch=record.one_batch or config.data.reuse_batch)


def _refuse_tuning_labels(provenance: Provenance) -> None:
    if provenance.weights.away("labels"):
        raise InputError(
            f"this run's weights would learn from labels of the target domain "
            f"({provenance.badge()}); add --allow_tuning_labels if that is meant."
        )


def _label_embedding(
    config: Config,
    data: assemble.Data,
    workdir: Workdir,
    stages: Sequence[Stage],
) -> label_embedding.LabelEmbedding | None:
    """Returns the run's label embedding; None where no stage has a head for it."""
    needed = any(stage.embedding_head for stage in stages)
    if needed and processes.is_lead() and not workdir.embedding_file.exists():
        _make_embedding(config, data, workdir)
    processes.wait_for_all("workdir")
    return label_embedding.load(workdir.embedding_file) if needed else None


def _make_embedding(config: Config, data: assemble.Data, workdir: Workdir) -> None:
    made = assemble.make_label_embedding(config, data)
    provenance = {
        "split": "train",
        "num_images": data.split("train").num_examples,
        "label_hash": data.vocabulary.content_hash(),
        "options": config.to_dict()["label_embedding"],
    }
    label_embedding.save(workdir.embedding_file, made, provenance=provenance)


def describe(session: Session) -> list[str]:
    """Returns what a person checks before a run: data, embedding, length."""
    data, config = session.data, session.config
    counts = ", ".join(f"{n} {s.num_examples}" for n, s in data.splits.items())
    rows = [
        f"data      {data.directory}: {len(data.vocabulary)} labels; images: {counts}"
    ]
    rows += [f"          {line}" for line in _left_out(session)]
    made = session.label_embedding
    if made is not None:
        rows.append(
            f"embedding {made.vectors.shape[1]} numbers a label, "
            f"{made.explained_energy:.1%} of the PMI matrix's energy"
        )
        rows += [f"          {line}" for line in _neighbours(session, made)]
    steps = sum(plan.stage.num_steps for plan in session.plans)
    rows.append(
        f"run       {session.workdir.path}: {len(session.plans)} stages, {steps} steps "
        f"of {config.global_batch_size} images on {hardware()}"
    )
    if isinstance(session.start, Trunk):
        rows.append(f"start     trunk from {session.start.origin}")
        if session.start.left_out:
            rows.append(
                f"          {session.start.left_out} left out: the file does not say "
                "which label a row is"
            )
    caveats = session.provenance[session.plans[-1].stage.name].caveats()
    return [f"CAVEAT    {caveat}" for caveat in caveats] + rows


def _left_out(session: Session) -> list[str]:
    """Returns the labels that do not train and the images that are not scored."""
    data, most = session.data, session.config.data.most_labels
    rows = []
    for split in dict.fromkeys(plan.stage.split for plan in session.plans):
        cut = int(np.sum(np.diff(data.training_rows(split).offsets) > most))
        if cut:
            rows.append(
                f"{cut} training images of {split} have over {most} labels: the rest "
                "is cut in training; evaluation uses all"
            )
    for split in dict.fromkeys((data.choosing_split, "validation", "test")):
        without = data.without_truth(split) if data.has_truth(split) else 0
        if without:
            rows.append(
                f"{without} of {data.split(split).num_examples} images of {split} have "
                "no verified label: they are left out of all figures"
            )
    return rows


def _neighbours(session: Session, made: label_embedding.LabelEmbedding) -> list[str]:
    """Returns the neighbours of the labels with the longest vectors.

    Those say most about what occurs together; the most frequent labels occur with
    everything, and have next to no direction of their own.
    """
    vocabulary = session.data.vocabulary
    lengths = np.linalg.norm(made.vectors, axis=1)
    rows = []
    for label in np.argsort(-lengths, kind="stable")[:NEIGHBOURS]:
        near = label_embedding.nearest(made.vectors, int(label), NEIGHBOURS)
        names = ", ".join(vocabulary.names([other for other, _ in near]))
        rows.append(f"{vocabulary.descriptions[label]} is near {names or 'nothing'}")
    return rows
