"""`prepare`: label files and images to a dataset that training reads."""

from jaxii.console import progress, say
from jaxii.prepare import kaggle
from jaxii.prepare.beam import Beam
from jaxii.storage import AnyPath


def prepare(
    directory: AnyPath,
    output: AnyPath,
    *,
    short_side: int,
    overrides: dict[str, AnyPath],
    beam_runner: str = "",
    beam_options: tuple[str, ...] = (),
) -> None:
    """Reads the files of a labelled image collection and writes a dataset."""
    layout = kaggle.Layout.find(directory, **overrides)
    with progress() as on_progress:
        counts = kaggle.prepare(
            layout,
            output,
            short_side=short_side,
            beam=Beam(beam_runner, beam_options) if beam_runner else None,
            on_progress=on_progress,
        )
    for line in counts.lines():
        say(line)
    say(f"dataset   {output}")
