"""The report of a run: one self-contained HTML file.

Everything from data is escaped. The content security policy allows only the page's own
script, by its hash.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxii.errors import InputError
from jaxii.evaluation.details import Details
from jaxii.report import figures, label_table, page_text
from jaxii.report.formatting import (
    as_text,
    count,
    flatten,
    number,
    number_or_none,
    percent,
    short,
)
from jaxii.report.run_files import (
    Row,
    images_per_second,
    last_rows,
    median,
    split_names,
)

NO_DETAILS = Details()
# Labels of an image that are shown, of each kind.
MOST_LABELS = 8
# In the order of the page; sections without content are left out.
SECTIONS = (
    ("training", "Training", "training"),
    ("threshold", "F2 against threshold", "threshold_figure"),
    ("slices", "Slices", "slices"),
    ("labels", "Labels", "labels"),
    ("map", "Label map", "map_figure"),
    ("images", "Best and worst images", "gallery"),
    ("decoders", "Decoders", "decoders"),
    ("shift", "Estimated domain shift", "estimates"),
    ("calibration", "Calibration", "reliability_figure"),
    ("figures", "All figures", "quality"),
    ("throughput", "Throughput", "throughput_figure"),
    ("configuration", "Configuration", "config"),
)
_FOLDER = Path(__file__).parent


@functools.cache
def templates() -> jinja2.Environment:
    """Returns the templates of all pages; they escape their values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "as_text": as_text,
        "base64": lambda data: base64.b64encode(data).decode(),
        "number": number,
        "short": short,
        "whole": count,
    }
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"),
        "allow_nan": False,
    }
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals["most_labels"] = MOST_LABELS
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = f"sha256-{digest}"
    return environment


def render(
    name: str,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Row],
    config: Mapping[str, Any],
    stages: Sequence[Row],
    details: Details = NO_DETAILS,
    recipe: Mapping[str, Any] | None = None,
) -> str:
    """Returns the report of an evaluated run as HTML.

    Args:
        name: The heading.
        metrics: Content of `metrics.json`. Every part may be absent.
        history: The training history.
        config: The resolved configuration, nested.
        stages: Rows with `name`, `first_step`, `last_step`, `embedding_head`, `terms`
            ({term: [first weight, last weight]}), `enters_from`,
            `train_step_compilations`, `best_step` and `best_f2`.
        details: Labels, their map, and images.
        recipe: `name` of the recipe, and `own`: its values of the fields that the
            command line changed; None if unknown.

    Raises:
        InputError: If the provenance in `metrics` is incomplete.
    """
    splits = {n: metrics["splits"][n] for n in split_names(metrics)}
    constant = metrics.get("constant") or {}
    floors = constant.get("f2") or {}
    chosen = metrics.get("decoder") or {}
    train = last_rows(history, "train")
    content = {
        "decoders": page_text.decoders(splits, chosen.get("name")),
        "estimates": page_text.estimates(metrics.get("estimates") or {}),
        "quality": page_text.quality(splits),
        "slices": page_text.all_slices(splits),
        "config": [(key, as_text(value)) for key, value in flatten(config).items()],
        **_figures(splits, history, stages, floors, chosen),
        **_details(details),
    }
    content["training"] = content["training_figure"] or stages
    template = templates().get_template("template.html.j2")
    return template.render(
        name=name,
        sections=[
            ("summary", "Summary"),
            *((id, title) for id, title, key in SECTIONS if content[key]),
        ],
        facts=page_text.facts(metrics),
        provenance=page_text.provenance(metrics),
        headlines=page_text.headlines(splits, floors),
        decoder=page_text.decoder(chosen),
        constant_labels=list(constant.get("names") or constant.get("labels") or []),
        stages=stages,
        recipe=page_text.recipe(recipe or {}, config),
        rate=number(images_per_second(history), ",.1f"),
        wait=percent(median(row.get("input_wait_share") for row in train)),
        **content,
    )


def with_sets(page: str, sets: Mapping[str, Any]) -> str:
    """Returns a page of `render` with another section on labelled sets.

    Args:
        page: The page.
        sets: See `run_files.read_sets`.

    Raises:
        InputError: If another version of jaxii wrote the page.
    """
    macros = templates().get_template("sets.html.j2").module
    values = page_text.sets(sets)
    for part in ("contents", "section"):
        start, end = f"<!-- {part} of sets -->", "<!-- end -->"
        before, found, after = page.partition(start)
        if not found:
            raise InputError(
                "report.html has no place for labelled sets, so another version of "
                "jaxii wrote it; run evaluate again."
            )
        after = after.partition(end)[2]
        page = f"{before}{start}{getattr(macros, part)(values)}{end}{after}"
    return page


def _figures(splits, history, stages, floors, chosen) -> dict[str, Markup]:
    """Returns the drawings by name; empty without data."""
    in_use = chosen.get("threshold") if chosen.get("name") == "threshold" else None
    drawn = {
        "training_figure": figures.training_curves(
            history, stages, number_or_none(floors.get("validation"))
        ),
        "threshold_figure": figures.f2_against_threshold(
            splits, floors, number_or_none(in_use)
        ),
        "reliability_figure": figures.reliability(splits),
        "throughput_figure": figures.throughput(history, stages),
    }
    return {name: Markup(drawing) for name, drawing in drawn.items()}


def _details(details: Details) -> dict[str, Any]:
    labels, label_map = details.labels, details.label_map
    found: dict[str, Any] = {
        "labels": labels and label_table.of_run(labels, label_map),
        "gallery": details.gallery,
        "map_figure": "",
        "map_notes": {},
    }
    if labels is not None and label_map is not None:
        drawing = label_table.draw_map(
            label_map, labels.vocabulary.descriptions, labels.train_images
        )
        found["map_figure"] = Markup(drawing)
        found["map_notes"] = page_text.map_notes(label_map, len(labels.train_images))
    return found
