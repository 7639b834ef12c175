"""`export`: writes a checkpoint that runs without jaxii."""

from jaxii.cli.flags import (
    Flags,
    declare_data_dir,
    declare_verify,
    existing,
    required,
)
from jaxii.cli.start import start_jax

HELP = """\
Exports a checkpoint to a folder that runs without jaxii: uint8 images in, probabilities
out, for any batch size. The files are read back and must reproduce the checkpoint's
probabilities on images of the validation split, or on synthetic images if the dataset
is not on this machine.

  python -m jaxii.main export --workdir=runs/emoji --output=exported
  cd exported && python    # import load; load.probabilities(images)

{flags}

The folder contains model.stablehlo (for CPUs, GPUs and TPUs), labels.csv with the
decoder's numbers for each label, export.json (image preprocessing, decoder, provenance)
and load.py, which needs only jax and numpy; load.predict_labels(images) applies the
decoder."""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.text("workdir", "DIR", "workdir of a trained and evaluated run")
    flags.text("output", "DIR", "new folder to write")
    flags.switch("onnx", "also write model.onnx; requires pip install 'jaxii[onnx]'")
    flags.choice(
        "decoder",
        "NAME",
        ("expected_f2", "threshold", "per_class", "top_k"),
        "decoder of the exported labels",
        otherwise="the one that the evaluation used; threshold for embedding",
    )
    declare_data_dir(flags)
    declare_verify(flags)


def run(flags: Flags) -> None:
    """Exports."""
    workdir, output = existing(flags, "workdir"), required(flags, "output")
    start_jax(flags)
    from jaxii.runs.export import export
    from jaxii.runs.workdir import Workdir

    export(
        Workdir(workdir),
        output=output,
        decoder=flags.decoder or "",
        onnx=flags.onnx,
        data_dir=flags.data_dir,
        verify=flags.verify,
    )
