"""The report of a run: one self-contained HTML file.

All text from data is escaped. The content security policy allows only the page's own
script, by its hash.
"""

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from jaxii.errors import InputError
from jaxii.evaluation.details import Details, StageRow
from jaxii.evaluation.result import EvaluationResult, SetResult, SplitMetrics
from jaxii.report import figures, label_table, page_text
from jaxii.report.formatting import (
    as_text,
    count,
    interval,
    number,
    percent,
    short,
)
from jaxii.report.run_files import (
    SETS,
    images_per_second,
    last_rows,
    median,
    split_names,
)
from jaxii.train.stages import Origin
from jaxii.train.telemetry.history import Row

NO_DETAILS = Details()
# Largest number of labels of each kind that are shown for an image.
MOST_LABELS = 8
# In the order of the page; sections without content are left out.
SECTIONS = (
    ("training", "Training", "training"),
    ("threshold", "F2 against threshold", "threshold_figure"),
    ("slices", "Slices", "splits"),
    ("labels", "Labels", "labels"),
    ("map", "Label map", "map_figure"),
    ("images", "Best and worst images", "gallery"),
    ("decoders", "Decoders", "splits"),
    ("shift", "Estimated domain shift", "estimates"),
    ("calibration", "Calibration", "reliability_figure"),
    ("figures", "All metrics", "splits"),
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
        "caveats": page_text.caveats,
        "influences": page_text.influences,
        "interval": interval,
        "number": number,
        "percent": percent,
        "setting": page_text.setting,
        "short": short,
        "signed": page_text.signed,
        "slice_tables": page_text.slice_tables,
        "some": page_text.some,
        "whole": count,
    }
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"),
        "allow_nan": False,
    }
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "decoder_titles": page_text.DECODERS,
        "estimate_titles": page_text.ESTIMATES,
        "facts": page_text.facts,
        "most_labels": MOST_LABELS,
        "quality": page_text.QUALITY,
        "sets_folder": SETS,
    }
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = f"sha256-{digest}"
    return environment


def render(
    name: str,
    result: EvaluationResult,
    *,
    history: Sequence[Row] = (),
    config: Mapping[str, object],
    stages: Sequence[StageRow] = (),
    details: Details = NO_DETAILS,
    recipe: Origin | None = None,
) -> str:
    """Returns the report of an evaluated run as HTML.

    Args:
        name: The heading.
        result: The figures.
        history: The training history.
        config: Field of the resolved configuration -> value; see `config.flatten`.
        stages: The stages that have begun, in order.
        details: Labels, their map, and images.
        recipe: The recipe of the configuration; None if unknown.
    """
    splits = {n: result.splits[n] for n in split_names(result.splits)}
    labels, drawn = details.labels, _figures(result, splits, history, stages, details)
    content = {
        "splits": splits,
        "labels": labels and label_table.of_run(labels, details.label_map),
        "gallery": details.gallery,
        "estimates": result.estimates,
        "held_out_length": result.held_out.length if result.held_out else 1.0,
        "config": [(key, as_text(value)) for key, value in config.items()],
        "training": drawn["training_figure"] or stages,
        **drawn,
    }
    train = last_rows(history, "train")
    return (
        templates()
        .get_template("template.html.j2")
        .render(
            name=name,
            sections=[
                ("summary", "Summary"),
                *((id, title) for id, title, key in SECTIONS if content[key]),
            ],
            result=result,
            # The test comes first, because runs are judged by it.
            cards=sorted(splits, key=lambda split: split != "test"),
            stages=stages,
            details=details,
            recipe_name=(recipe or {}).get("name"),
            changed=page_text.changed(recipe or {}, config),
            rate=number(images_per_second(history), ",.1f"),
            wait=percent(median(row.get("input_wait_share") for row in train)),
            **content,
        )
    )


def with_sets(page: str, sets: Mapping[str, SetResult]) -> str:
    """Returns a page of `render` with its section on labelled sets replaced.

    Args:
        page: The page.
        sets: See `run_files.read_sets`.

    Raises:
        InputError: If another version of jaxii wrote the page.
    """
    macros = templates().get_template("sets.html.j2").module
    for part in ("contents", "section"):
        start, end = f"<!-- {part} of sets -->", "<!-- end -->"
        before, found, after = page.partition(start)
        if not found:
            raise InputError(
                "report.html has no section for labelled sets, so another version of "
                "jaxii wrote it; run evaluate again."
            )
        after = after.partition(end)[2]
        page = f"{before}{start}{getattr(macros, part)(sets)}{end}{after}"
    return page


def _figures(
    result: EvaluationResult,
    splits: Mapping[str, SplitMetrics],
    history: Sequence[Row],
    stages: Sequence[StageRow],
    details: Details,
) -> dict[str, Markup]:
    """Returns the drawings by name; empty without data."""
    floors, decoder = result.constant.f2, result.decoder
    in_use = decoder.choice.threshold if decoder.name == "threshold" else None
    drawn = {
        "training_figure": figures.training_curves(
            history, stages, floors.get("validation")
        ),
        "threshold_figure": figures.f2_against_threshold(splits, floors, in_use),
        "reliability_figure": figures.reliability(splits),
        "throughput_figure": figures.throughput(history, stages),
        "map_figure": label_table.draw_map(details.label_map, details.labels),
    }
    return {name: Markup(drawing) for name, drawing in drawn.items()}
