"""`predict`: the labels of every picture of a folder, with nothing but a workdir."""

from typing import Any

import numpy as np

from jaxii import assemble, processes
from jaxii.console import progress, say
from jaxii.data import embedding
from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.files import AnyPath
from jaxii.infer import decoders as decoding
from jaxii.infer import predict as prediction
from jaxii.infer.provenance import Provenance
from jaxii.scoring import Variant, say_first
from jaxii.train import loop
from jaxii.train.mesh import make_mesh
from jaxii.trained import Trained, open_trained
from jaxii.workdir import Workdir

# What the pictures of the folder are called in a provenance.
PICTURES = "predicted"


def predict(
    workdir: Workdir,
    *,
    images: AnyPath,
    ids: AnyPath | None,
    output: AnyPath,
    decoder: str,
    stage: str,
    variant: Variant,
) -> None:
    """Writes the labels of every picture of a folder.

    Args:
      workdir: of an evaluated run.
      images: a folder of pictures.
      ids: which of them, in which order; None for all.
      output: the CSV file to write.
      decoder: whose answers; "" for the one that `evaluate` used.
      stage: whose best checkpoint; "" for the one that was evaluated.
      variant: what is done to the model before; of the pictures of the folder.
    """
    config, vocabulary, mesh = workdir.config(), workdir.vocabulary(), make_mesh()
    # An adaptation is to these pictures; what `evaluate` adapted to does not matter.
    averaged = ["ensemble"] if variant.ensemble else []
    metrics = workdir.metrics(averaged)
    image_ids, files = _files(images, ids)
    members = _members(workdir, stage or metrics["stage"], variant, metrics)
    models = [member.model(mesh) for member in members]
    provenance = _provenance(metrics, members[0], variant)
    say_first(provenance)
    decoders = _decoders(workdir, averaged)
    decoder = decoder or metrics["decoder"]["name"]
    has_head = loop.EMBEDDING_HEAD in models[0].params and len(models) == 1
    decoders.check(decoder, decoders.names(has_head=has_head))

    def target():
        return assemble.unlabelled_batches(config, files)

    with progress() as on_progress:
        answers = prediction.answer(
            variant.predict_on(models, mesh, target, decoders),
            assemble.file_batches(config, files),
            num_rows=len(files),
            decode=decoders.answer(decoder),
            mesh=mesh,
            on_progress=on_progress,
        )
    labels, damaged = answers.complete(_constant(metrics, vocabulary))
    if processes.is_lead():
        prediction.write_submission(
            output, image_ids, labels, vocabulary, provenance.to_json()
        )
    for row in damaged:
        where = files.paths[row] or f"{image_ids[row]} (no such file)"
        say(f"unreadable {where}: given the most frequent labels")
    setting = "".join(f" ({k} {v})" for k, v in decoders.parameter(decoder).items())
    said = f"decoder {decoder}{setting}; provenance: {provenance.badge()}"
    say(f"{len(files)} rows, {len(damaged)} of them unreadable; {said}")
    say(f"submission {output}")


def _members(
    workdir: Workdir, stage: str, variant: Variant, metrics: dict[str, Any]
) -> tuple[Trained, ...]:
    """Returns the checkpoint, and after it those of the other runs of an ensemble."""
    own = open_trained(f"{workdir.path}@{stage}")
    members = (own, *variant.open_others(own, workdir.vocabulary().content_hash()))
    names = [member.name for member in members]
    if variant.ensemble and names != metrics["members"]:
        raise InputError(
            f"thresholds were chosen for the mean of {'; '.join(metrics['members'])} "
            f"and not of {'; '.join(names)}; run evaluate with the same --ensemble "
            "first."
        )
    return members


def _constant(metrics: dict[str, Any], vocabulary: Vocabulary) -> np.ndarray:
    index = vocabulary.index()
    return np.array([index[code] for code in metrics["constant"]["labels"]])


def _decoders(workdir: Workdir, averaged: list[str]) -> decoding.Decoders:
    made = workdir.embedding_file
    vectors = embedding.load(made).vectors if made.exists() else None
    return decoding.load(workdir.result_file("decoders.npz", averaged), vectors)


def _provenance(metrics: dict[str, Any], own: Trained, variant: Variant) -> Provenance:
    """Returns the record of the answers: that of the figures, and of another stage."""
    record = Provenance.from_json(metrics["provenance"]).union(own.provenance)
    return variant.provenance(record, [PICTURES], [PICTURES])


def _files(images: AnyPath, ids: AnyPath | None) -> tuple[list[str], prediction.Files]:
    """Returns image ids and their pictures: all of a folder, or those of a list."""
    pictures = prediction.find_pictures(images)
    image_ids = list(pictures) if ids is None else prediction.read_ids(ids)
    paths = tuple(pictures.get(image_id) for image_id in image_ids)
    return image_ids, prediction.Files(paths)
