"""`compare`: runs side by side."""

from pathlib import Path

from jaxii.infer.report.compare import compare as make_comparison
from jaxii.infer.report.compare import print_table


def compare(workdirs: list[Path]) -> None:
    """Prints a table of runs: how they differ, and what came of it."""
    print_table(make_comparison(workdirs))
