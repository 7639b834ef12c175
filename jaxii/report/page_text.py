"""The text sections of a run's page: values of the template, as strings."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from jaxii.evaluation.details import LabelMap
from jaxii.evaluation.provenance import PARTS, Provenance
from jaxii.evaluation.result import recurring_notes
from jaxii.report.formatting import (
    ABSENT,
    as_text,
    count,
    flatten,
    interval,
    number,
    number_or_none,
    short,
)
from jaxii.report.run_files import SETS

# Unknown labels and unreadable images of a set that are named.
MOST_NAMED = 20
DECODERS = {
    "threshold": "global threshold",
    "per_class": "threshold per label, shrunk toward the global one",
    "top_k": "k most probable labels",
    "embedding": "k nearest labels in the embedding",
    "expected_f2": "largest expected F2 under calibrated probabilities",
}
ESTIMATES = {
    "validation": "validation: domains seen in training",
    "held_out_domains": "held-out domains: mean over domains",
}


def facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (title, text) pairs that identify the run."""
    plain = {
        "dataset": "Dataset",
        "stage": "Stage",
        "step": "Step",
        "num_params": "Parameters",
        "seed": "Seed",
        "hardware": "Hardware",
        "created": "Created",
        "config_hash": "Config hash",
        "data_hash": "Dataset hash",
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


def provenance(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the badge, its caveats and the splits that influenced each part."""
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
        "caveats": [
            *record.caveats(),
            *(f"{note}." for note in recurring_notes(metrics.get("recurring") or {})),
        ],
        "parts": parts,
    }


def headlines(
    splits: Mapping[str, Any], floors: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Returns one card per split, the test first: it is the one to judge a run by."""
    cards = []
    for name in sorted(splits, key=lambda name: name != "test"):
        f2, floor = splits[name].get("f2"), floors.get(name)
        cards.append(
            {
                "split": name,
                "f2": number(f2),
                "floor": number(floor),
                "gain": _difference(f2, floor),
                "images": count(splits[name].get("num_images")),
                "interval": interval(splits[name].get("interval")),
            }
        )
    return cards


def _difference(one: Any, other: Any) -> str:
    """Returns `one` - `other` with its sign, or an empty string if one is absent."""
    known, reference = number_or_none(one), number_or_none(other)
    if known is None or reference is None:
        return ""
    return f"{known - reference:+.4f}".replace("-", "−")


def decoder(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns name, threshold and selection split of the decoder in use."""
    threshold = number_or_none(chosen.get("threshold"))
    return {
        "name": as_text(chosen.get("name") or ABSENT),
        "threshold": "" if threshold is None else f"{threshold:.3g}",
        "uses_threshold": threshold is not None and chosen.get("name") == "threshold",
        "chosen_on": as_text(chosen.get("chosen_on") or ""),
    }


def decoders(splits: Mapping[str, Any], in_use: Any) -> dict[str, Any]:
    """Returns one row per decoder with its figures on each split; {} without decoders.

    `in_use` is the name of the decoder that produces the figures of the result.
    """
    by_split = {n: s["decoders"] for n, s in splits.items() if s.get("decoders")}
    names = dict.fromkeys(name for table in by_split.values() for name in table)
    rows = []
    for name in names:
        found = [table.get(name) or {} for table in by_split.values()]
        settings = [text for text in map(_setting, found) if text]
        rows.append(
            {
                "name": DECODERS.get(name, name),
                "in_use": name == in_use,
                "setting": settings[0] if settings else "",
                "figures": [
                    (
                        _with_error(decoder),
                        count(decoder.get("coverage")),
                        short(decoder.get("labels_per_image")),
                    )
                    for decoder in found
                ],
            }
        )
    if not rows:
        return {}
    has_errors = any("±" in f2 for row in rows for f2, _, _ in row["figures"])
    return {"splits": list(by_split), "rows": rows, "has_errors": has_errors}


def estimates(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the estimates of F2 on new domains, with their held-out domains."""
    rows = []
    for name, title in ESTIMATES.items():
        estimate = found.get(name) or {}
        if not estimate:
            continue
        f2, test = estimate.get("f2"), estimate.get("test_f2")
        rows.append(
            {
                "name": title,
                "closer": name == found.get("closer"),
                "f2": number(f2),
                "threshold": short(estimate.get("threshold")),
                "test": number(test),
                "off": _difference(f2, test) or ABSENT,
                "domains": [
                    (domain, number(value))
                    for domain, value in (estimate.get("domains") or {}).items()
                ],
            }
        )
    return rows


def _setting(decoder: Mapping[str, Any]) -> str:
    if decoder.get("k") is not None:
        return f"k = {count(decoder['k'])}"
    threshold = number(decoder.get("threshold"), ".3g")
    return "" if threshold == ABSENT else f"threshold {threshold}"


def _with_error(decoder: Mapping[str, Any]) -> str:
    error = number(decoder.get("standard_error"))
    f2 = number(decoder.get("f2"))
    return f2 if error == ABSENT else f"{f2} ± {error}"


def quality(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one row per figure and one column per split."""
    rows = (
        ("Images", "num_images", count),
        ("Images without verified labels, excluded", "num_images_without_truth", count),
        ("Mean F2", "f2", number),
        ("Best F2 at any threshold", "best_f2", number),
        ("Threshold of the best F2", "best_threshold", short),
        ("Micro F2", "micro_f2", number),
        ("Macro F2", "macro_f2", number),
        ("Mean average precision", "map", number),
        ("Classes in mean average precision", "map_num_classes", count),
        ("Recall at 5 labels", "recall_at_5", number),
        ("Labels correctly predicted at least once", "coverage", count),
        ("Predicted labels per image", "labels_per_image_predicted", short),
        ("True labels per image", "labels_per_image_true", short),
        ("Cross-entropy per image", "bce", short),
        ("Calibration error", "calibration_error", number),
    )
    table = [
        (title, [form(s.get(key)) for s in splits.values()])
        for title, key, form in rows
        if any(number_or_none(s.get(key)) is not None for s in splits.values())
    ]
    return {"columns": list(splits), "rows": table} if table else {}


def sets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the values of each labelled set; see `run_files.read_sets`."""
    return [_set(name, metrics) for name, metrics in found.items()]


def _set(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    splits, chosen = metrics["splits"], metrics["decoder"]
    without = splits[name]["num_images_without_truth"]
    record = Provenance.from_json(metrics["provenance"])
    return {
        "name": name,
        "card": headlines(splits, metrics["constant"]["f2"])[0],
        "without": count(without) if without else "",
        "link": f"{SETS}/{quote(metrics['folder'])}/report.html",
        "dataset": metrics["dataset"],
        "badge": record.badge(),
        "caveats": [
            *record.caveats(),
            *(f"{note}." for note in recurring_notes(metrics.get("recurring") or {})),
        ],
        "unknown": _some(metrics["unknown_labels"]),
        "broken": _some(metrics["broken_images"]),
        "decoders": decoders(splits, chosen["name"]),
        "chosen_on": chosen["chosen_on"],
        "slices": all_slices(splits),
    }


def _some(items: Sequence[str]) -> str:
    """Returns the number of items and the first of them; "" for none."""
    more = ", ..." if len(items) > MOST_NAMED else ""
    return f"{count(len(items))} ({', '.join(items[:MOST_NAMED])}{more})" * bool(items)


def all_slices(splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a table of slices for each split that has some, the last split first."""
    names = [name for name, summary in splits.items() if summary.get("slices")]
    return [_slices(name, splits[name]) for name in reversed(names)]


def _slices(split: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the slices of a split, the worst first, and where to draw them."""

    def f2(item: tuple[str, Any]) -> float:
        known = number_or_none(item[1].get("f2"))
        return 2.0 if known is None else known

    def percent(value: float) -> float:
        return round(100 * (value - left) / (right - left), 2)

    rows, draws = [], summary.get("bootstrap") or {}
    left, right = _scale(summary)
    for name, entry in sorted(summary["slices"].items(), key=f2):
        mean = number_or_none(entry.get("f2"))
        row = {
            "name": name,
            "worst": name == summary.get("worst_slice"),
            "images": count(entry.get("num_images")),
            "f2": number(mean),
            "error": number(entry.get("standard_error")),
            "interval": interval(entry.get("interval")),
            "mark": None,
        }
        if mean is not None:
            low, high = map(percent, entry.get("interval") or (mean, mean))
            width = round(high - low, 2)
            row["mark"] = {"mean": percent(mean), "low": low, "width": width}
        rows.append(row)
    mean = number_or_none(summary.get("f2"))
    return {
        "split": split,
        "rows": rows,
        "mean": None if mean is None else percent(mean),
        "scale": (f"{left:.1f}", f"{right:.1f}"),
        "mean_text": number(mean),
        "bootstrap": draws and _bootstrap(draws),
        "has_intervals": any(row["interval"] for row in rows),
    }


def _scale(summary: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the range of all means and intervals of a split, rounded to tenths."""
    values = [summary.get("f2")]
    for entry in summary["slices"].values():
        values += [entry.get("f2"), *(entry.get("interval") or ())]
    known = [v for v in map(number_or_none, values) if v is not None] or [0.0]
    left = max(0, math.floor(10 * min(known)))
    return left / 10, max(left + 1, math.ceil(10 * max(known))) / 10


def _bootstrap(draws: Mapping[str, Any]) -> str:
    by = {"image": "images", "group": "whole groups of images"}[draws["by"]]
    return (
        f"{100 * draws['level']:.0f} % intervals are percentiles of the mean over "
        f"{draws['resamples']:,} seeded bootstrap resamples of {by}."
    )


def recipe(found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe's name and the fields in which the run differs from it.

    `found` is empty, or has `name` and `own`: the recipe's values of changed fields.
    """
    fields = flatten(config)
    changed = [
        (field, as_text(own), as_text(fields.get(field)))
        for field, own in (found.get("own") or {}).items()
        if as_text(own) != as_text(fields.get(field))
    ]
    return {"name": str(found.get("name") or ""), "changed": changed}


def map_notes(label_map: LabelMap, num_labels: int) -> dict[str, Any]:
    """Returns the variance that the map shows and the number of labels not on it."""
    x, y = label_map.shares
    lacking = num_labels - len(label_map.class_ids)
    return {
        "share": f"{100 * (x + y):.0f} %",
        "lacking": count(lacking) if lacking else "",
    }
