"""`compare`: runs side by side."""

from jaxii.config import FREE_FIELDS
from jaxii.console import say
from jaxii.errors import InputError
from jaxii.report.comparison import (
    as_markdown,
    as_table,
    build_comparison,
    print_table,
)
from jaxii.report.run_files import read_run
from jaxii.storage import AnyPath, write_text


def compare(
    paths: list[AnyPath], *, output: AnyPath | None, each: bool, markdown: bool
) -> None:
    """Prints a table of runs: how they differ, and what came of it.

    Args:
      paths: workdirs, or files `metrics_VARIANT.json` in them.
      output: the page with images, which is written too; None: no page.
      each: every run is a row; otherwise runs that differ only by their seed are one.
      markdown: print the table for a README, and nothing else.
    """
    if not paths:
        raise InputError(
            "compare was given no workdir; it needs one or more; name the folders of "
            "finished runs."
        )
    comparison = build_comparison(
        [read_run(path) for path in paths], each=each, ignored=FREE_FIELDS
    )
    if output is not None:
        # Here and not above: `main` imports every command, and matplotlib takes time.
        from jaxii.report.comparison_page import render_comparison

        write_text(output, render_comparison(comparison))
    if markdown:
        say(as_markdown(comparison))
        return
    print_table(as_table(comparison))
    if output is not None:
        say(f"page  {output}")
