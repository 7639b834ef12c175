"""`prepare`: label files and pictures to a dataset that training reads."""

from pathlib import Path

from jaxii.console import progress, say
from jaxii.data import open_images


def prepare(
    directory: Path, output: Path, *, short_side: int, overrides: dict[str, Path]
) -> None:
    """Reads the files of a labelled image collection and writes a dataset."""
    layout = open_images.Layout.find(directory, **overrides)
    with progress() as on_progress:
        counts = open_images.prepare(
            layout, output, short_side=short_side, on_progress=on_progress
        )
    for line in counts.lines():
        say(line)
    say(f"dataset   {output}")
