"""The report of a run: one HTML file that needs nothing else, to read, send or print.

Comes last in the flow: evaluation hands in its result, the training history and the
stage table. `parts` makes text of them, `figures` drawings; the template places them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxii.evaluation.details import Details
from jaxii.report import decoders, figures, label_map_figure, label_table, parts
from jaxii.report.runs import (
    Row,
    as_text,
    flatten,
    images_per_second,
    last_rows,
    median,
    number_or_none,
    split_names,
)
from jaxii.report.templates import templates
from jaxii.report.words import number, percent
from jaxii.storage import AnyPath, write_beside

REPORT_NAME = "report.html"
NO_DETAILS = Details()
# In the order of the page; a section without content is left out, here and there.
SECTIONS = (
    ("training", "Training", "training"),
    ("threshold", "F2 against threshold", "threshold_figure"),
    ("slices", "Slices", "slices"),
    ("labels", "Labels", "labels"),
    ("map", "Label map", "map_figure"),
    ("images", "Best and worst images", "gallery"),
    ("decoders", "Decoders", "decoders"),
    ("shift", "Foreseeing the shift", "estimates"),
    ("calibration", "Calibration", "reliability_figure"),
    ("figures", "All figures", "quality"),
    ("throughput", "Throughput", "throughput_figure"),
    ("configuration", "Configuration", "config"),
)


def write_report(
    output: AnyPath,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Row],
    config: Mapping[str, Any],
    stages: Sequence[Row],
    details: Details = NO_DETAILS,
    recipe: Mapping[str, Any] | None = None,
) -> AnyPath:
    """Writes the report of an evaluated run.

    Args:
        output: the file to write, or a folder: then `report.html` in it.
        metrics: the evaluation result, as in `metrics.json`. Every part may be absent.
        history: rows of the training history.
        config: the resolved configuration, nested.
        stages: rows with `name`, `first_step`, `last_step`, `embedding_head`, `terms`
            ({term: [first weight, last weight]}), `enters_from`,
            `train_step_compilations`, `best_step` and `best_f2`.
        details: labels, their map, and images.
        recipe: `name` of the recipe, and `own`: its values of the fields that the
            command line changed; None where no recipe is known.

    Returns:
        The file.

    Raises:
        InputError: the provenance in `metrics` is not a whole record.
    """
    path = output / REPORT_NAME if output.is_dir() else output
    page = render(
        path.parent.absolute().name,
        metrics=metrics,
        history=history,
        config=config,
        stages=stages,
        details=details,
        recipe=recipe,
    )
    write_beside(path, lambda file: file.write(page))
    return path


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
    """Returns the page as text; the arguments are those of `write_report`.

    Args:
        name: of the run, as the heading says it.
        metrics: the evaluation result.
        history: rows of the training history.
        config: the resolved configuration, nested.
        stages: rows of the stage table.
        details: labels, their map, and images.
        recipe: what the configuration came of.
    """
    splits = {n: metrics["splits"][n] for n in split_names(metrics)}
    constant = metrics.get("constant") or {}
    floors = constant.get("f2") or {}
    chosen = metrics.get("decoder") or {}
    train = last_rows(history, "train")
    content = {
        "decoders": decoders.table(splits, chosen.get("name")),
        "estimates": decoders.estimates(metrics.get("estimates") or {}),
        "quality": parts.quality(splits),
        "config": [(key, as_text(value)) for key, value in flatten(config).items()],
        **_figures(splits, history, stages, floors, chosen.get("threshold")),
        **_details(details),
    }
    content["training"] = content["training_figure"] or stages
    content["slices"] = [
        parts.slices(n, splits[n]) for n in reversed(splits) if splits[n].get("slices")
    ]
    return (
        templates()
        .get_template("template.html.j2")
        .render(
            name=name,
            sections=[
                ("summary", "Summary"),
                *((id, title) for id, title, key in SECTIONS if content[key]),
            ],
            facts=parts.facts(metrics),
            provenance=parts.provenance(metrics),
            headlines=parts.headlines(splits, floors),
            decoder=parts.decoder(chosen),
            constant_labels=list(constant.get("names") or constant.get("labels") or []),
            stages=[parts.stage(row) for row in stages],
            recipe=parts.recipe(recipe or {}, config),
            rate=number(images_per_second(history), ",.1f"),
            wait=percent(median(row.get("input_wait_share") for row in train)),
            **content,
        )
    )


def _figures(splits, history, stages, floors, threshold) -> dict[str, Markup]:
    """Returns the drawings by name; empty where there is nothing to draw."""
    drawn = {
        "training_figure": figures.training_curves(
            history, stages, number_or_none(floors.get("validation"))
        ),
        "threshold_figure": figures.f2_against_threshold(
            splits, floors, number_or_none(threshold)
        ),
        "reliability_figure": figures.reliability(splits),
        "throughput_figure": figures.throughput(history, stages),
    }
    return {name: Markup(drawing) for name, drawing in drawn.items()}


def _details(details: Details) -> dict[str, Any]:
    labels, label_map = details.labels, details.label_map
    found: dict[str, Any] = {
        "labels": labels and label_table.of_run(labels, label_map),
        "gallery": details.gallery and parts.gallery(details.gallery),
        "map_figure": "",
        "map_notes": {},
    }
    if labels is not None and label_map is not None:
        drawing = label_map_figure.draw(
            label_map, labels.vocabulary.descriptions, labels.train_images
        )
        found["map_figure"] = Markup(drawing)
        found["map_notes"] = parts.map_notes(label_map, len(labels.train_images))
    return found
