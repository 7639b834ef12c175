"""Writes a checkpoint as StableHLO (for JAX) and ONNX programs, and checks them."""

import csv
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jaxii.data.labels import Vocabulary
from jaxii.decoding.calibration import HIGHEST_LOGIT, LOWEST_LOGIT
from jaxii.decoding.decoders import CONFIDENCE, Decoders
from jaxii.errors import InputError
from jaxii.evaluation.evaluator import gather
from jaxii.evaluation.predictor import Batches, Model, Predict, predicted
from jaxii.export.onnx_graph import INPUT, OPSET, OUTPUT, packages, to_onnx

PROGRAM, ONNX, LABELS, LOADER = "model.stablehlo", "model.onnx", "labels.csv", "load.py"
RUNTIME = "flatbuffers.zip"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The largest difference of a probability between a written program and the checkpoint.
TOLERANCE = 1e-4
# By default accelerators multiply float32 with reduced precision.
PRECISION = "highest"
BATCH_SIZES = (1, 3)
# Decoders that `load.py` can apply; programs do not return the embedding.
DECODERS = ("expected_f2", "threshold", "per_class", "top_k")

Images = UInt8[np.ndarray, "batch height width 3"]
Probs = Float[np.ndarray, "batch class"]
Program = Callable[[Images], Probs]


@dataclass(frozen=True)
class WrittenProgram:
    """A program on disk that has been compared with the checkpoint.

    Attributes:
      facts: Platforms and JAX version of StableHLO; opset and tensor names of ONNX.
      largest_difference: Largest difference of a probability from the checkpoint's, at
        most `TOLERANCE`.
    """

    facts: Mapping[str, object]
    largest_difference: float

    def to_json(self) -> dict[str, object]:
        return {
            **self.facts,
            "compute_dtype": "float32",
            "largest_difference": self.largest_difference,
        }


def checkpoint_predictions(
    predict: Predict, batches: Batches, mesh: jax.sharding.Mesh
) -> tuple[Images, Probs]:
    """Returns images without padding, and their probabilities as in evaluation."""
    images, probs = [], []
    needed = ({name: batch[name] for name in ("images", "mask")} for batch in batches)
    for batch, found, _ in predicted(predict, needed, mesh):
        kept = gather(batch["mask"]) > 0
        images.append(gather(batch["images"])[kept])
        probs.append(gather(found)[kept])
    return np.concatenate(images), np.concatenate(probs)


def stablehlo(model: Model, size_pixels: int) -> bytes:
    """Returns a serialized `jax.export` program, for batches of any size."""
    exported = jax.export.export(jax.jit(_forward(model)), platforms=PLATFORMS)
    with jax.default_matmul_precision(PRECISION), _without_paths():
        return bytes(exported(_any_batch(size_pixels)).serialize())


def onnx(model: Model, size_pixels: int, metadata: dict[str, str]) -> bytes:
    """Returns a serialized ONNX model with metadata, for batches of any size."""
    program = jax.make_jaxpr(_forward(model))(_any_batch(size_pixels))
    return to_onnx(program, metadata)


def read_stablehlo(path: Path) -> Program:
    """Returns a written StableHLO program as a function of images."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(exported.call)
    return lambda images: np.asarray(call(images))


def read_onnx(path: Path) -> Program:
    """Returns a written ONNX model as a function of images that runs on the CPU."""
    _, onnxruntime = packages()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})[0]


def largest_difference(run: Program, images: Images, probs: Probs) -> float:
    """Returns the largest difference of a program's probabilities from `probs`.

    Several batch sizes are compared. There must be at least one image.
    """
    sizes = [min(size, len(images)) for size in BATCH_SIZES] + [len(images)]
    found = [np.abs(run(images[:size]) - probs[:size]).max() for size in sizes]
    # `max` propagates NaN.
    return float(np.max(found))


def write_programs(
    folder: Path,
    model: Model,
    images: Images,
    probs: Probs,
    *,
    onnx_metadata: dict[str, str] | None,
) -> dict[str, WrittenProgram]:
    """Writes the programs, reads them back and compares them with the checkpoint.

    Args:
      folder: Existing folder.
      model: The checkpoint's model.
      images: Images to compare on, at least 1.
      probs: The checkpoint's probabilities of the images.
      onnx_metadata: Metadata of the ONNX model; None for no ONNX model.

    Returns:
      File name -> program.

    Raises:
      InputError: If a difference exceeds `TOLERANCE`, or ONNX is not installed.
    """
    size = images.shape[1]
    (folder / PROGRAM).write_bytes(stablehlo(model, size))
    facts = {PROGRAM: {"platforms": PLATFORMS, "jax": jax.__version__}}
    programs = {PROGRAM: read_stablehlo(folder / PROGRAM)}
    if onnx_metadata is not None:
        (folder / ONNX).write_bytes(onnx(model, size, onnx_metadata))
        facts[ONNX] = {"opset": OPSET, "input": INPUT, "output": OUTPUT}
        programs[ONNX] = read_onnx(folder / ONNX)
    written: dict[str, WrittenProgram] = {}
    for name, run in programs.items():
        difference = largest_difference(run, images, probs)
        if not difference <= TOLERANCE:
            raise InputError(
                f"a probability of {name} differs from the checkpoint's by "
                f"{difference:.2g}; at most {TOLERANCE} is allowed, so nothing was "
                "written. Try another version of jax or onnxruntime."
            )
        written[name] = WrittenProgram(facts[name], difference)
    return written


def write_labels(
    path: Path, vocabulary: Vocabulary, decoders: Decoders, name: str
) -> None:
    """Writes one CSV row per label, with its numbers for the decoders.

    Args:
      name: One of `DECODERS`; per_class writes its thresholds, the others the common
        threshold of the decoder threshold.
    """
    numbers = {
        "threshold": thresholds_of(decoders, name, len(vocabulary)),
        "slope": decoders.calibration.slopes,
        "intercept": decoders.calibration.intercepts,
        "frequency": decoders.frequencies,
    }
    codes, texts = vocabulary.codes, vocabulary.descriptions
    rows = zip(codes, texts, *numbers.values(), strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("index", "code", "name", *numbers))
        for i, (code, text, *values) in enumerate(rows):
            writer.writerow((i, code, text, *map(str, values)))


def thresholds_of(decoders: Decoders, name: str, num_classes: int) -> Iterable[Any]:
    """Returns a threshold per class: that of `per_class`, or the common one."""
    if name == "per_class":
        return decoders.class_thresholds
    return [decoders.choice.threshold] * num_classes


def parameters_of(decoders: Decoders, name: str) -> dict[str, float | int | None]:
    """Returns the parameters of a decoder by name, without those in `labels.csv`."""
    if name == "expected_f2":
        return {
            "confidence": CONFIDENCE,
            "lowest_logit": LOWEST_LOGIT,
            "highest_logit": HIGHEST_LOGIT,
        }
    return decoders.parameter(name)


def write_loader(folder: Path) -> None:
    """Writes the loader and the package flatbuffers.

    `jax.export` reads programs with flatbuffers, which JAX does not install.
    """
    text = Path(__file__).with_name("loader.py.txt").read_text(encoding="utf-8")
    (folder / LOADER).write_text(text, encoding="utf-8")
    # Imported here because no other command needs it.
    import flatbuffers

    (package,) = map(Path, flatbuffers.__path__)
    with zipfile.ZipFile(folder / RUNTIME, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*.py")):
            archive.write(file, file.relative_to(package.parent))


def _forward(model: Model) -> Callable[[Any], Any]:
    # Arrays on devices would bind the program to this mesh.
    held = jax.device_get((model.params, model.batch_stats))
    params, batch_stats = jax.tree.map(jnp.asarray, held)

    def forward(images):
        outputs, _ = model.apply(params, batch_stats, images, train=False, key=None)
        return jax.nn.sigmoid(outputs.logits)

    return forward


@contextmanager
def _without_paths() -> Iterator[None]:
    """Keeps paths of source files out of programs."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _any_batch(size_pixels: int) -> jax.ShapeDtypeStruct:
    (batch,) = jax.export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, size_pixels, size_pixels, 3), jnp.uint8)
