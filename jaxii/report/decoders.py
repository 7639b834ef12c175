"""What the report says of decoders, and of the estimates that foresaw the shift.

Before it: the evaluation result. After it: `page` places the tables.
"""

from collections.abc import Mapping
from typing import Any

from jaxii.report.runs import number_or_none
from jaxii.report.words import ABSENT, count, number, short

NAMES = {
    "threshold": "threshold on the classifier",
    "per_class": "threshold of each label, drawn toward the one of all",
    "top_k": "k most probable labels",
    "embedding": "k nearest labels of the embedding",
    "expected_f2": "largest expected F2, probabilities calibrated",
}
ESTIMATES = {
    "validation": "validation, of the domains trained on",
    "held_out_domains": "held-out domains, mean over them",
}


def table(splits: Mapping[str, Any], in_use: Any) -> dict[str, Any]:
    """Returns one row a decoder and, for each split, its figures.

    Args:
        splits: evaluation summaries by split.
        in_use: name of the decoder that makes the figures of the result.

    Returns:
        Nothing where no split has decoders.
    """
    by_split = {n: s["decoders"] for n, s in splits.items() if s.get("decoders")}
    names = dict.fromkeys(name for decoders in by_split.values() for name in decoders)
    rows = []
    for name in names:
        found = [decoders.get(name) or {} for decoders in by_split.values()]
        settings = [text for text in map(_setting, found) if text]
        rows.append(
            {
                "name": NAMES.get(name, name),
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
    has_errors = any("±" in f2 for row in rows for f2, _, _ in row["figures"])
    if not rows:
        return {}
    return {"splits": list(by_split), "rows": rows, "has_errors": has_errors}


def estimates(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one row an estimate of F2 on new domains, and one a held-out domain.

    Args:
        found: `estimates` of the evaluation result; may be empty.
    """
    rows = []
    for name, title in ESTIMATES.items():
        estimate = found.get(name) or {}
        if not estimate:
            continue
        f2, test = (number_or_none(estimate.get(key)) for key in ("f2", "test_f2"))
        off = None if f2 is None or test is None else f2 - test
        rows.append(
            {
                "name": title,
                "closer": name == found.get("closer"),
                "f2": number(f2),
                "threshold": short(estimate.get("threshold")),
                "test": number(test),
                "off": number(off, "+.4f").replace("-", "−"),
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
