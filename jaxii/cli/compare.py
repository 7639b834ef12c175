"""`compare`: shows runs side by side."""

from jaxii.cli.flags import Flags, file_to_write
from jaxii.config import FREE_FIELDS
from jaxii.errors import InputError
from jaxii.storage import AnyPath, at, write_text

HELP = """\
Prints a table of runs: the fields in which they differ, F2 of each split, worst slice,
mAP, coverage, decoder, provenance and images/s. Runs that differ only in their seed
share a row with mean and standard deviation.

  python -m jaxii.main compare runs/a runs/b runs/b/metrics_tuned_on_tuning.json

{flags}"""


def declare(flags: Flags) -> None:
    """Declares the command's flags."""
    flags.takes_words("RUNS")
    flags.text("output", "HTML", "also write a page with the table and charts")
    flags.switch("each", "print one row per run, even if only the seed differs")
    flags.switch("markdown", "print the table as Markdown")


def run(flags: Flags) -> None:
    """Compares."""
    compare(
        [at(word) for word in flags.words],
        output=file_to_write(flags, "output", "HTML"),
        each=flags.each,
        markdown=flags.markdown,
    )


def compare(
    paths: list[AnyPath], *, output: AnyPath | None, each: bool, markdown: bool
) -> None:
    """Prints a table of runs and writes the page, if one is wanted.

    Args:
      paths: Workdirs, or files `metrics_VARIANT.json` in them.
      output: The page to write; None for none.
      each: Whether every run is a row; otherwise runs that differ only by their seed
        are one.
      markdown: Whether to print the table as Markdown, and nothing else.

    Raises:
      InputError: If there is no path, or a run has not been evaluated.
    """
    if not paths:
        raise InputError(
            "compare was given no workdir; give the workdirs of one or more evaluated "
            "runs."
        )
    from jaxii.console import say
    from jaxii.report.comparison import (
        as_markdown,
        build_comparison,
        print_comparison,
    )
    from jaxii.report.run_files import read_run

    comparison = build_comparison(
        [read_run(path) for path in paths], each=each, ignored=FREE_FIELDS
    )
    if output is not None:
        from jaxii.report.comparison_page import render_comparison

        write_text(output, render_comparison(comparison))
    if markdown:
        for line in as_markdown(comparison).split("\n"):
            say(line)
        return
    print_comparison(comparison)
    if output is not None:
        say(f"page  {output}")
