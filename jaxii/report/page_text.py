"""Texts and tables of a run's page, as values of its template."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from jaxii.evaluation.provenance import PARTS, Provenance
from jaxii.evaluation.result import (
    EvaluationResult,
    SliceMetrics,
    SplitMetrics,
)
from jaxii.report.formatting import ABSENT, as_text, count, number, short
from jaxii.train.stages import Origin

# Largest number of unknown labels, and of unreadable images, of a set that are named.
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
# Title, field of `SplitMetrics` and form of each row of the table of all figures.
QUALITY = (
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


def facts(result: EvaluationResult) -> list[tuple[str, str]]:
    """Returns (title, text) pairs that identify the run."""
    return [
        ("Dataset", result.dataset),
        ("Stage", result.stage),
        ("Step", count(result.step)),
        ("Parameters", count(result.num_params)),
        ("Seed", str(result.seed)),
        ("Hardware", result.hardware),
        ("Created", f"{datetime.fromisoformat(result.created):%Y-%m-%d %H:%M %Z}"),
        ("Config hash", result.config_hash),
        ("Dataset hash", result.data_hash),
        ("Label hash", result.label_hash),
    ]


def caveats(result: EvaluationResult) -> list[str]:
    """Returns sentences that a reader needs before trusting the figures."""
    notes = [f"{note}." for note in result.recurring_notes()]
    return [*result.provenance.caveats(), *notes]


def influences(record: Provenance) -> list[tuple[str, str, str]]:
    """Returns each part of the result, and the splits that influenced it."""
    rows = []
    for part in PARTS:
        influence = getattr(record, part)
        splits = (", ".join(s) or ABSENT for s in (influence.labels, influence.images))
        rows.append((part.replace("_", " "), *splits))
    return rows


def signed(value: float) -> str:
    """Returns a difference with its sign."""
    return f"{value:+.4f}".replace("-", "−")


def setting(parameter: Mapping[str, float | int | None]) -> str:
    """Returns the parameter of a decoder as text; "" for none."""
    forms = {"k": "k = {:,}", "threshold": "threshold {:.3g}"}
    return "".join(forms[name].format(value) for name, value in parameter.items())


def some(items: Sequence[str]) -> str:
    """Returns the number of items and the first of them; "" for none."""
    more = ", ..." if len(items) > MOST_NAMED else ""
    return f"{count(len(items))} ({', '.join(items[:MOST_NAMED])}{more})" * bool(items)


@dataclass(frozen=True)
class SliceTable:
    """The slices of a split, drawn on an axis of F2 from `left` to `right`."""

    split: str
    figures: SplitMetrics
    left: float
    right: float

    def rows(self) -> list[tuple[str, SliceMetrics]]:
        """Returns names and figures, the worst first."""
        return sorted(self.figures.slices.items(), key=lambda item: item[1].f2)

    def percent(self, value: float) -> float:
        """Returns the place of an F2 on the axis, in percent of its length."""
        return round(100 * (value - self.left) / (self.right - self.left), 2)


def slice_tables(splits: Mapping[str, SplitMetrics]) -> list[SliceTable]:
    """Returns the table of each split, the last split first."""
    tables = []
    for split, figures in reversed(list(splits.items())):
        values = [figures.f2]
        for part in figures.slices.values():
            values += [part.f2, *(part.interval or ())]
        # The axis covers all means and intervals and ends at tenths.
        left = max(0, math.floor(10 * min(values)))
        right = max(left + 1, math.ceil(10 * max(values)))
        tables.append(SliceTable(split, figures, left / 10, right / 10))
    return tables


def changed(recipe: Origin, config: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Returns the fields in which a run differs from its recipe, with both values.

    Args:
      recipe: The recipe of the configuration.
      config: Field of the resolved configuration -> value.
    """
    return [
        (field, as_text(own), as_text(config.get(field)))
        for field, own in recipe.get("own", {}).items()
        if as_text(own) != as_text(config.get(field))
    ]
