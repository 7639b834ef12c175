"""`export`: writes a checkpoint as programs that run without jaxii."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxii.config import Config
from jaxii.console import say
from jaxii.data.labels import Vocabulary
from jaxii.decoding import decoders as decoding
from jaxii.decoding.calibration import HIGHEST_LOGIT, LOWEST_LOGIT
from jaxii.errors import InputError
from jaxii.evaluation.predictor import Batches, Model, make_predict
from jaxii.evaluation.result import EvaluationResult
from jaxii.export import programs as exporting
from jaxii.export.onnx_graph import packages
from jaxii.prepare import recode
from jaxii.runs import assembly
from jaxii.runs.images import open_images
from jaxii.runs.run import Run
from jaxii.runs.workdir import Workdir
from jaxii.storage import AnyPath, local_draft_folder, names_in, write_json

# Number of images that the written files are checked on, and the batch size of the
# checkpoint's predictions for them.
NUM_IMAGES, BATCH_SIZE = 64, 16
# Side of synthetic images, in pixels. The transform of evaluation enlarges them, which
# makes them smooth.
SYNTHETIC_SIDE = 8


@dataclass(frozen=True)
class Check:
    """The images and tolerances that the written files are checked with.

    Attributes:
      num_images: Number of images compared.
      images: "validation" for images of this split; "synthetic" for smooth random
        images, which replace them if the dataset is not there.
      tolerance: The largest difference of a probability that is allowed.
      compute_dtype: The type in which the run evaluates; its thresholds were chosen on
        probabilities of this type. The files compute in float32.
      compute_dtype_difference: The largest difference of a probability from float32.
    """

    num_images: int
    images: str
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
      decoder: Decoder of the exported labels, one of `programs.DECODERS`; "" for the
        one that `evaluate` used, or threshold if it used embedding.
      onnx: Whether to write an ONNX model too.
      data_dir: Folder of the dataset, if it has moved; "" otherwise.
      verify: Whether to hash every byte of the data first.

    Raises:
      InputError: If the decoders were fitted on another checkpoint, or the dataset is
        damaged or another one, or is missing although `data_dir` or `verify` is given.
    """
    if onnx:
        packages()
    metrics = workdir.metrics()
    decoders = decoding.load(workdir.result_file("decoders.npz"), None)
    workdir.check_current(metrics)
    used = metrics.decoder.name
    name = decoder or (used if used in exporting.DECODERS else "threshold")
    with Run.open(workdir.path, metrics.stage, data_dir=data_dir, verify=verify) as run:
        run.check_evaluated(metrics)
        record = _record(run, metrics, decoders, name)
        for caveat in record["caveats"]:
            say(f"CAVEAT     {caveat}")
        missing = "" if data_dir or verify else _missing_data(run.config)
        with local_draft_folder(output) as folder:
            model = run.model()
            images, probs, check = _images(run, model, is_synthetic=bool(missing))
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
    _tell_check(check, written, missing)
    words = " ".join([name, *map(str, decoders.parameter(name).values())])
    if name != used:
        say(f"CAVEAT     the run uses {used}; the exported labels use {words}")
    say(f"decoder {words}; provenance: {record['badge']}")
    say(f"export {output}")


def _record(
    run: Run, metrics: EvaluationResult, decoders: decoding.Decoders, name: str
) -> dict[str, Any]:
    """Returns the facts for `export.json` that need no computation."""
    provenance = metrics.provenance.union(run.provenance)
    data = run.config.data
    size = data.image_size_pixels
    short_side = assembly.stored_short_side(run.config, run.short_side_pixels)
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
            "run_uses": metrics.decoder.name,
            **exporting.parameters_of(decoders, name),
            "chosen_on": metrics.decoder.chosen_on,
        },
    }


def _missing_data(config: Config) -> str:
    """Returns why there is no dataset; "" if its folder has files."""
    try:
        directory = assembly.data_directory(config)
        if directory.is_file() or names_in(directory):
            return ""
    except (InputError, OSError) as error:
        return str(error)
    return f"{directory} is empty"


def _images(
    run: Run, model: Model, *, is_synthetic: bool
) -> tuple[exporting.Images, exporting.Probs, Check]:
    """Returns images, the checkpoint's float32 probabilities, and their `Check`."""
    # The batch size of training may be thousands.
    config, mesh = replace(run.config, global_batch_size=BATCH_SIZE), run.mesh

    def answers(model: Model) -> tuple[exporting.Images, exporting.Probs]:
        if is_synthetic:
            batches = _synthetic(config)
        else:
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
            images="synthetic" if is_synthetic else "validation",
            tolerance=exporting.TOLERANCE,
            compute_dtype=config.model.compute_dtype,
            compute_dtype_difference=float(np.abs(own - probs).max()),
        ),
    )


def _synthetic(config: Config) -> Batches:
    """Yields smooth random images, the same ones each time."""
    shape = NUM_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_SIDE, 3
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    short_side = assembly.largest_short_side(config)
    return assembly.file_batches(config, open_images(images, short_side=short_side))


def _for_onnx(record: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, str]:
    """Returns the metadata of the ONNX file."""
    kept = {name: record[name] for name in ("provenance", "images", "decoder")}
    kept["labels"] = vocabulary.codes
    return {name: json.dumps(value) for name, value in kept.items()}


def _tell_check(
    check: Check, written: Mapping[str, exporting.WrittenProgram], missing: str
) -> None:
    if missing:
        say(
            f"CAVEAT     checked on synthetic images, because the dataset is not there "
            f"({missing}); to check on images of validation, give its --data_dir"
        )
    for name, program in written.items():
        say(
            f"{name:16} differs from the checkpoint by at most "
            f"{program.largest_difference:.1e}, on {check.num_images} {check.images} "
            "images"
        )
    if check.compute_dtype != "float32":
        say(
            f"{'':16} (in float32; the run evaluates in {check.compute_dtype}, "
            f"which differs by at most {check.compute_dtype_difference:.1e})"
        )
