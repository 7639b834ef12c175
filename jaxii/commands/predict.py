"""`predict`: the labels of every picture of a folder, with nothing but a workdir."""

from pathlib import Path

import jax
import numpy as np

from jaxii import assemble
from jaxii.console import progress, say
from jaxii.data import embedding
from jaxii.infer import decoders as decoding
from jaxii.infer import predict as prediction
from jaxii.infer.evaluate import make_forward
from jaxii.infer.provenance import Provenance
from jaxii.train import loop
from jaxii.train.checkpoint import Checkpoints, evaluated_params
from jaxii.train.mesh import make_mesh, replicated
from jaxii.workdir import Workdir


def predict(
    workdir: Workdir,
    *,
    images: Path,
    ids: Path | None,
    output: Path,
    decoder: str,
    stage: str,
) -> None:
    """Writes the labels of every picture of a folder."""
    config, vocabulary = workdir.config(), workdir.vocabulary()
    metrics = workdir.metrics()
    image_ids, files = _files(images, ids)
    mesh = make_mesh()
    checkpoints = Checkpoints(
        workdir.path,
        [stage["name"] for stage in config.stages],
        vocabulary.content_hash(),
    )
    saved = checkpoints.best_of(stage or metrics["stage"])
    model = checkpoints.restore_model(saved, replicated(mesh))
    params = evaluated_params(model)
    has_head = loop.EMBEDDING_HEAD in params
    made = workdir.embedding_file
    vectors = embedding.load(made).vectors if made.exists() else None
    decoders = decoding.load(workdir.result_file("decoders.npz"), vectors)
    decoder = decoder or metrics["decoder"]["name"]
    decoders.check(decoder, decoders.names(has_head=has_head))
    network = assemble.Networks(
        config=config,
        num_classes=len(vocabulary),
        embedding_dim=vectors.shape[1] if vectors is not None else 0,
    ).get(has_head)
    with progress() as on_progress:
        answers = prediction.answer(
            make_forward(network.apply, mesh),
            params,
            model["batch_stats"],
            assemble.file_batches(config, files),
            num_rows=len(files),
            decode=decoders.answer(decoder),
            mesh=mesh,
            on_progress=on_progress,
        )
    index = vocabulary.index()
    fallback = np.array([index[code] for code in metrics["constant"]["labels"]])
    labels, damaged = answers.complete(fallback)
    if jax.process_index() == 0:
        prediction.write_submission(
            output, image_ids, labels, vocabulary, metrics["provenance"]
        )
    for row in damaged:
        where = files.paths[row] or f"{image_ids[row]} (no such file)"
        say(f"unreadable {where}: given the most frequent labels")
    badge = Provenance.from_json(metrics["provenance"]).badge()
    said = f"decoder {decoder} {decoders.parameter(decoder) or ''}; provenance: {badge}"
    say(f"{len(files)} rows, {len(damaged)} of them unreadable; {said}")
    say(f"submission {output}")


def _files(images: Path, ids: Path | None) -> tuple[list[str], prediction.Files]:
    """Returns image ids and their pictures: all of a folder, or those of a list."""
    pictures = prediction.find_pictures(images)
    image_ids = list(pictures) if ids is None else prediction.read_ids(ids)
    paths = tuple(pictures.get(image_id) for image_id in image_ids)
    return image_ids, prediction.Files(paths)
