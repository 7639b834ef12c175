"""The report of a run: one HTML file that needs nothing else, to read, send or print.

Comes last in the flow: evaluation hands in its result, the training history and the
stage table. Here numbers become text and figures; the template places them.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from jaxii.files import AnyPath, write_beside
from jaxii.infer.provenance import PARTS, Provenance
from jaxii.infer.report import decoders, figures
from jaxii.infer.report.runs import (
    Row,
    as_text,
    flatten,
    images_per_second,
    last_rows,
    median,
    number_or_none,
    split_names,
)
from jaxii.infer.report.words import ABSENT, count, number, percent, short

REPORT_NAME = "report.html"


def write_report(
    output: AnyPath,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Row],
    config: Mapping[str, Any],
    stages: Sequence[Row],
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
) -> str:
    """Returns the page as text; the arguments are those of `write_report`.

    Args:
        name: of the run, as the heading says it.
        metrics: the evaluation result.
        history: rows of the training history.
        config: the resolved configuration, nested.
        stages: rows of the stage table.
    """
    splits = {n: metrics["splits"][n] for n in split_names(metrics)}
    constant = metrics.get("constant") or {}
    floors = constant.get("f2") or {}
    decoder = metrics.get("decoder") or {}
    train = last_rows(history, "train")
    return (
        templates()
        .get_template("template.html.j2")
        .render(
            name=name,
            facts=_facts(metrics),
            provenance=_provenance(metrics),
            headlines=_headlines(splits, floors),
            decoder=_decoder(decoder),
            constant_labels=list(constant.get("names") or constant.get("labels") or []),
            quality=_quality(splits),
            slices=[_slices(n, s) for n, s in splits.items() if s.get("slices")],
            decoders=decoders.table(splits, decoder.get("name")),
            estimates=decoders.estimates(metrics.get("estimates") or {}),
            stages=[_stage(row) for row in stages],
            rate=number(images_per_second(history), ",.1f"),
            wait=percent(median(row.get("input_wait_share") for row in train)),
            config=[(key, as_text(value)) for key, value in flatten(config).items()],
            training_figure=Markup(
                figures.training_curves(
                    history, stages, number_or_none(floors.get("validation"))
                )
            ),
            threshold_figure=Markup(
                figures.f2_against_threshold(
                    splits, floors, number_or_none(decoder.get("threshold"))
                )
            ),
            reliability_figure=Markup(figures.reliability(splits)),
            throughput_figure=Markup(figures.throughput(history, stages)),
        )
    )


def templates() -> jinja2.Environment:
    """Returns the templates of the pages, which escape what they are given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    plain = {
        "dataset": "Dataset",
        "stage": "Stage",
        "step": "Step",
        "num_params": "Parameters",
        "seed": "Seed",
        "hardware": "Hardware",
        "created": "Created",
        "config_hash": "Config hash",
        "label_hash": "Label hash",
    }
    forms = {"step": count, "num_params": count, "created": _moment}
    return [
        (title, forms.get(key, as_text)(metrics[key]))
        for key, title in plain.items()
        if metrics.get(key) is not None
    ]


def _moment(value: Any) -> str:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return as_text(value)
    return f"{moment:%Y-%m-%d %H:%M %Z}".strip()


def _provenance(metrics: Mapping[str, Any]) -> dict[str, Any]:
    if not metrics.get("provenance"):
        return {"badge": "not recorded", "clean": False, "caveats": [], "parts": []}
    record = Provenance.from_json(metrics["provenance"])
    parts = [
        {
            "name": part.replace("_", " "),
            "labels": ", ".join(getattr(record, part).labels) or ABSENT,
            "images": ", ".join(getattr(record, part).images) or ABSENT,
        }
        for part in PARTS
    ]
    return {
        "badge": record.badge(),
        "clean": record.clean,
        "caveats": record.caveats(),
        "parts": parts,
    }


def _headlines(
    splits: Mapping[str, Any], floors: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns the large figures: test first, as it is what a run is judged by."""
    order = ["test", *(n for n in splits if n != "test")]
    cards = []
    for name in (n for n in order if n in splits):
        f2, floor = number_or_none(splits[name].get("f2")), floors.get(name)
        floor = number_or_none(floor)
        card = {
            "split": name,
            "f2": number(f2),
            "floor": number(floor),
            "gain": "",
            "images": count(splits[name].get("num_images")),
        }
        if f2 is not None and floor is not None:
            card["gain"] = f"{f2 - floor:+.4f}".replace("-", "−")
        cards.append(card)
    return cards


def _decoder(decoder: Mapping[str, Any]) -> dict[str, str]:
    threshold = number_or_none(decoder.get("threshold"))
    return {
        "name": as_text(decoder.get("name") or ABSENT),
        "threshold": "" if threshold is None else f"{threshold:.3g}",
        "chosen_on": as_text(decoder.get("chosen_on") or ""),
    }


def _quality(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one row per figure and one column per split."""
    rows = (
        ("Images", "num_images", count),
        ("Mean F2", "f2", number),
        ("Best F2 at any threshold", "best_f2", number),
        ("Threshold of the best F2", "best_threshold", short),
        ("Micro F2", "micro_f2", number),
        ("Macro F2", "macro_f2", number),
        ("Mean average precision", "map", number),
        ("Classes in the mean average precision", "map_num_classes", count),
        ("Recall in the first 5 labels", "recall_at_5", number),
        ("Labels ever predicted rightly", "coverage", count),
        ("Labels an image, predicted", "labels_per_image_predicted", short),
        ("Labels an image, true", "labels_per_image_true", short),
        ("Cross-entropy of an image", "bce", short),
        ("Calibration error", "calibration_error", number),
    )
    table = [
        (title, [form(s.get(key)) for s in splits.values()])
        for title, key, form in rows
        if any(number_or_none(s.get(key)) is not None for s in splits.values())
    ]
    return {"columns": list(splits), "rows": table}


def _slices(split: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the slices of a split, the worst first."""

    def f2(item: tuple[str, Any]) -> float:
        known = number_or_none(item[1].get("f2"))
        return 2.0 if known is None else known

    rows = [
        {
            "name": name,
            "worst": name == summary.get("worst_slice"),
            "images": count(entry.get("num_images")),
            "f2": number(entry.get("f2")),
            "error": number(entry.get("standard_error")),
            "bar": round(100 * (number_or_none(entry.get("f2")) or 0.0), 2),
        }
        for name, entry in sorted(summary["slices"].items(), key=f2)
    ]
    return {"split": split, "rows": rows}


def _stage(row: Row) -> dict[str, Any]:
    first, last = row.get("first_step"), row.get("last_step")
    terms = []
    for term, weights in (row.get("terms") or {}).items():
        texts = [number(w, ".3g") for w in weights]
        changes = len(set(texts)) > 1
        terms.append((term, " → ".join(texts) if changes else texts[0]))
    return {
        "name": as_text(row.get("name") or ABSENT),
        "steps": f"{count(first)} to {count(last)}",
        "head": "yes" if row.get("embedding_head") else "no",
        "terms": terms,
        "enters_from": as_text(row.get("enters_from") or ABSENT),
        "compilations": count(row.get("train_step_compilations")),
        "best_step": count(row.get("best_step")),
        "best_f2": number(row.get("best_f2")),
    }
