"""A run's folder opened together with its data: what `train` and `evaluate` work on.

Comes after the configuration is checked and before anything is trained or measured.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxii import assemble
from jaxii import config as configuration
from jaxii.console import progress
from jaxii.data import embedding
from jaxii.infer import result
from jaxii.infer.evaluate import Evaluator
from jaxii.infer.provenance import Provenance
from jaxii.train import loop
from jaxii.train.checkpoint import Checkpoints
from jaxii.train.mesh import make_mesh, replicated
from jaxii.workdir import Workdir

# How many labels are shown with how many of their neighbours, as a check by eye.
NEIGHBOURS = 3


@dataclass(frozen=True, kw_only=True)
class Session:
    """A workdir opened together with its data, ready to train or to be evaluated."""

    workdir: Workdir
    config: configuration.Config
    data: assemble.Data
    label_embedding: embedding.LabelEmbedding | None
    plans: tuple[loop.StagePlan, ...]
    mesh: jax.sharding.Mesh
    checkpoints: Checkpoints
    provenance: Provenance

    def evaluator(self) -> Evaluator:
        """Returns the evaluator of the run's labels and slices."""
        return Evaluator(
            mesh=self.mesh,
            num_classes=len(self.data.vocabulary),
            slices=self.data.slices,
            label_embeddings=self.vectors(),
        )

    def vectors(self) -> jax.Array | None:
        """Returns the label embeddings on the devices, [class, embed]."""
        if self.label_embedding is None:
            return None
        return jax.device_put(self.label_embedding.vectors, replicated(self.mesh))

    def plan(self, stage: str) -> loop.StagePlan:
        """Returns a stage's plan by name."""
        return next(plan for plan in self.plans if plan.stage.name == stage)

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
    config: configuration.Config, workdir: Workdir, *, claim: bool = True
) -> Session:
    """Opens the data and assembles the run.

    Args:
      config: checked.
      workdir: of the run; its labels have to be the data's.
      claim: make the workdir this configuration's, or check that it is.
    """
    with progress() as on_progress:
        data = assemble.open_data(config, on_progress)
    stages = assemble.stages_of(config, lambda split: data.split(split).num_examples)
    needs_embedding = any(stage.embedding_head for stage in stages)
    dim = config.label_embedding.dim if needs_embedding else 0
    plans = assemble.make_plans(
        config, assemble.make_networks(config, data, dim), stages
    )
    if needs_embedding:
        assemble.check_label_embedding(config, data)
    # Nothing is written before everything that can be refused has been checked.
    workdir.claim_labels(data.vocabulary)
    if claim:
        workdir.claim(config)
    label_hash = data.vocabulary.content_hash()
    return Session(
        workdir=workdir,
        config=config,
        data=data,
        label_embedding=_embedding(config, data, workdir) if needs_embedding else None,
        plans=plans,
        mesh=make_mesh(),
        checkpoints=Checkpoints(
            workdir.path, [stage.name for stage in stages], label_hash
        ),
        provenance=result.clean_provenance(
            label_hash=label_hash,
            with_embedding=needs_embedding,
            pretrained=config.model.pretrained,
            chosen_on=data.choosing_split,
        ),
    )


def _embedding(
    config: configuration.Config, data: assemble.Data, workdir: Workdir
) -> embedding.LabelEmbedding:
    if workdir.embedding_file.exists():
        return embedding.load(workdir.embedding_file)
    made = assemble.make_label_embedding(config, data)
    provenance = {
        "split": "train",
        "num_images": data.split("train").num_examples,
        "label_hash": data.vocabulary.content_hash(),
        "options": configuration.to_dict(config)["label_embedding"],
    }
    embedding.save(workdir.embedding_file, made, provenance=provenance)
    return made


def describe(session: Session) -> list[str]:
    """Returns what a person checks before a run: data, embedding, length."""
    data, config = session.data, session.config
    counts = ", ".join(f"{n} {s.num_examples}" for n, s in data.splits.items())
    rows = [
        f"data      {data.directory}: {len(data.vocabulary)} labels; images: {counts}"
    ]
    most = config.data.most_labels
    cut = int(np.sum(np.diff(data.train_rows.offsets) > most))
    if cut:
        rows.append(
            f"          {cut} training images have over {most} labels: the rest is cut"
        )
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
        f"of {config.global_batch_size} images on {result.hardware()}"
    )
    return rows


def _neighbours(session: Session, made: embedding.LabelEmbedding) -> list[str]:
    """Returns the neighbours of the labels with the longest vectors.

    Those say most about what occurs together; the most frequent labels occur with
    everything, and have next to no direction of their own.
    """
    vocabulary = session.data.vocabulary
    lengths = np.linalg.norm(made.vectors, axis=1)
    rows = []
    for label in np.argsort(-lengths, kind="stable")[:NEIGHBOURS]:
        near = embedding.nearest(made.vectors, int(label), NEIGHBOURS)
        names = ", ".join(vocabulary.names([other for other, _ in near]))
        rows.append(f"{vocabulary.descriptions[label]} is near {names or 'nothing'}")
    return rows
