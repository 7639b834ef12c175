"""The page of a comparison: one HTML file with images and table, to read or to send.

Comes after `compare` made the rows; `comparison_figures` draws them.
"""

from markupsafe import Markup

from jaxii.report import comparison_figures as figures
from jaxii.report import side_by_side
from jaxii.report.compare import Comparison, floors
from jaxii.report.table import is_text_column
from jaxii.report.templates import templates
from jaxii.storage import AnyPath, write_beside

SECTIONS = (
    ("runs", "Mean F2 by run", "dots"),
    ("shift", "In domain and shifted", "shift"),
    ("figures", "All figures", "rows"),
    ("slices", "Slices", "slices"),
    ("labels", "Labels", "labels"),
    ("gaps", "Over-fitting by step", "gaps"),
)


def write_comparison(output: AnyPath, comparison: Comparison) -> None:
    """Writes the page of a comparison.

    Args:
        output: the file to write.
        comparison: of at least one run.
    """
    page = render_comparison(comparison)
    write_beside(output, lambda file: file.write(page))


def render_comparison(comparison: Comparison) -> str:
    """Returns the page of a comparison as text."""
    entries, constant = comparison.entries, floors(comparison.entries)
    count = len(entries)
    content = {
        "rows": comparison.rows,
        "dots": Markup(figures.dots(entries, constant)),
        "shift": Markup(figures.shift(entries)),
        "gaps": Markup(figures.gaps(entries)),
        "slices": side_by_side.slices(entries),
        "labels": side_by_side.labels(entries),
    }
    return (
        templates()
        .get_template("comparison.html.j2")
        .render(
            heading=f"{count} runs" if count > 1 else entries[0].title,
            sections=[(id, title) for id, title, key in SECTIONS if content[key]],
            has_seeds=any(len(entry.runs) > 1 for entry in entries),
            columns=[
                {"name": name, "kind": _kind(comparison, i)}
                for i, name in enumerate(comparison.columns)
            ],
            notes=comparison.notes,
            labels_split=side_by_side.last_split(entries),
            **content,
        )
    )


def _kind(comparison: Comparison, position: int) -> str:
    if comparison.columns[position] == "provenance":
        return "badge"
    if position == 0 or not is_text_column(comparison, position):
        return "name" if position == 0 else "figure"
    return "setting" if position < comparison.num_text_columns else "words"
