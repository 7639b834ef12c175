"""`export`: writes a checkpoint as programs that run without jaxii."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxii.console import say
from jaxii.data.labels import Vocabulary
from jaxii.decoding import decoders as decoding
from jaxii.decoding.calibration import HIGHEST_LOGIT, LOWEST_LOGIT
from jaxii.evaluation.predictor import Model, make_predict
from jaxii.evaluation.result import EvaluationResult
from jaxii.export import programs as exporting
from jaxii.export.onnx_graph import packages
from jaxii.prepare import recode
from jaxii.runs import assembly
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, local_draft_folder, write_json

# Number of validation images that the written files are checked on, and the batch size
# of the checkpoint's predictions for them.
NUM_IMAGES, BATCH_SIZE = 64, 16


@dataclass(frozen=True)
class Check:
    """The images and tolerances that the written files are checked with.

    Attributes:
      num_images: Number of images compared.
      split: Split of these images.
      tolerance: The largest difference of a probability that is allowed.
      compute_dtype: The type in which the run evaluates; its thresholds were chosen on
        probabilities of this type. The files compute in float32.
      compute_dtype_difference: The largest difference of a probability from float32.
    """

    num_images: int
    split: str
    tolerance: float
    compute_dtype: str
    compute_dtype_difference: float


def export(
    workdir: Workdir,
    *,
    output: AnyPath,
    decoder: str,
    onnx: bool,
    data_dir: str,
    verify: bool = False,
) -> None:
    """Writes a checkpoint as a StableHLO program with all that is needed to use it.

    Args:
      workdir: The workdir of an evaluated run.
      output: A folder that does not exist yet.
      decoder: Decoder whose thresholds are written, threshold or per_class; "" for the
        one that `evaluate` used if it has thresholds, else threshold.
      onnx: Whether to write an ONNX model too.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      verify: Whether to hash every byte of the data first.

    Raises:
      InputError: If the decoders were fitted on another checkpoint.
    """
    if onnx:
        packages()
    metrics = workdir.metrics()
    decoders = decoding.load(workdir.result_file("decoders.npz"), None)
    used = metrics.decoder.name
    name = decoder or (used if used in exporting.WITH_THRESHOLDS else "threshold")
    with Run.open(workdir.path, metrics.stage, data_dir=data_dir, verify=verify) as run:
        run.check_evaluated(metrics)
        record = _record(run, metrics, decoders, name)
        for caveat in record["caveats"]:
            say(f"CAVEAT     {caveat}")
        with local_draft_folder(output) as folder:
            model = run.model()
            images, probs, check = _images(run, model)
            written = exporting.write_programs(
                folder,
                run.in_float32(model, portable=True),
                images,
                probs,
                onnx_metadata=_for_onnx(record, run.vocabulary) if onnx else None,
            )
            exporting.write_labels(
                folder / exporting.LABELS, run.vocabulary, decoders, name
            )
            exporting.write_loader(folder)
            record["check"] = asdict(check)
            record["programs"] = {key: each.to_json() for key, each in written.items()}
            write_json(folder / "export.json", record)
    _tell(check, written)
    say(
        f"decoder {name}: load.py predicts labels with the thresholds in "
        f"labels.csv; provenance: {record['badge']}"
    )
    say(f"export {output}")


def _record(
    run: Run, metrics: EvaluationResult, decoders: decoding.Decoders, name: str
) -> dict[str, Any]:
    """Returns the facts for `export.json` that need no computation."""
    provenance = metrics.provenance.union(run.provenance)
    data = run.config.data
    size = data.image_size_pixels
    short_side = assembly.stored_short_side(run.config, metrics.short_side_pixels)
    as_found = {"how": ["Files are stored unchanged."]}
    return {
        "checkpoint": {
            "stage": run.saved.stage,
            "step": run.saved.step,
            "config_hash": metrics.config_hash,
            "seed": metrics.seed,
            "dataset": metrics.dataset,
        },
        "provenance": provenance.to_json(),
        "badge": provenance.badge(),
        "caveats": provenance.caveats(),
        "images": {
            "type": f"uint8 [batch, {size}, {size}, 3], RGB, 0 to 255",
            "stored": recode.describe(short_side) if short_side else as_found,
            "view": assembly.eval_transform(run.config).describe(),
        },
        "probabilities": f"float32 [batch, {len(decoders.class_thresholds)}], in the "
        "order of labels.csv; calibrated: sigmoid(slope * logit + intercept), with the "
        f"logit clipped to [{LOWEST_LOGIT:g}, {HIGHEST_LOGIT:g}]",
        "decoder": {
            "name": name,
            **decoders.parameter(name),
            "chosen_on": metrics.decoder.chosen_on,
        },
    }


def _images(run: Run, model: Model) -> tuple[exporting.Images, exporting.Probs, Check]:
    """Returns images, the checkpoint's float32 probabilities, and their `Check`."""
    # The batch size of training may be thousands.
    config, mesh = replace(run.config, global_batch_size=BATCH_SIZE), run.mesh

    def answers(model: Model) -> tuple[exporting.Images, exporting.Probs]:
        batches = assembly.eval_batches(config, run.data, "validation", NUM_IMAGES)
        return exporting.checkpoint_predictions(
            make_predict([model], mesh), batches, mesh
        )

    with jax.default_matmul_precision(exporting.PRECISION):
        images, probs = answers(run.in_float32(model))
    _, own = answers(model)
    return (
        images,
        probs,
        Check(
            num_images=len(images),
            split="validation",
            tolerance=exporting.TOLERANCE,
            compute_dtype=config.model.compute_dtype,
            compute_dtype_difference=float(np.abs(own - probs).max()),
        ),
    )


def _for_onnx(record: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, str]:
    """Returns the metadata of the ONNX file."""
    kept = {name: record[name] for name in ("provenance", "images", "decoder")}
    kept["labels"] = vocabulary.codes
    return {name: json.dumps(value) for name, value in kept.items()}


def _tell(check: Check, written: Mapping[str, exporting.WrittenProgram]) -> None:
    for name, program in written.items():
        say(
            f"{name:16} differs from the checkpoint by at most "
            f"{program.largest_difference:.1e}, on {check.num_images} images of "
            f"{check.split}"
        )
    if check.compute_dtype != "float32":
        say(
            f"{'':16} (in float32; the run evaluates in {check.compute_dtype}, "
            f"which differs by at most {check.compute_dtype_difference:.1e})"
        )
