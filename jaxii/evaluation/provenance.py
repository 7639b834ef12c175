"""What influenced a result: labels and unlabelled images, by split and by part.

A record starts empty, grows as the label embedding, the weights, the choice of a
checkpoint, calibration and thresholds are made, and travels in checkpoints, the label
embedding's file, `metrics.json`, the report and beside submissions. It tells a reader
whether the figures for new domains are honest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

from jaxii.errors import InputError
from jaxii.train.stages import Stage

HOME_SPLITS = ("train", "validation", "held_out")
"""Splits that may influence anything; to be clean, every other one stays unseen.

All three are made of the training data: `held_out` is a domain of it, kept out of
training, and is no more the target's than `validation` is."""

PARTS = {
    "weights": "shaped the weights",
    "model_selection": "selected the checkpoint",
    "calibration": "calibrated the probabilities",
    "thresholds": "chose the thresholds",
    "label_embedding": "entered the label embedding",
}
"""The parts of a result that data can influence, and the words that say so."""

ONE_BATCH = "no result: one batch"
_KINDS = {"labels": "labels", "images": "images without labels"}
_MEANING = {
    "labels": "figures on {split} do not stand for unseen data, and none for a domain "
    "without labels",
    "images": "figures on {split} stand for images that a model may see before it "
    "answers",
}


@dataclass(frozen=True)
class Influence:
    """The splits that influenced one part of a result.

    Args:
        labels: names of splits whose labels (with their images) did, sorted.
        images: names of splits whose images did, without their labels, sorted.
    """

    labels: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def away(self, kind: str) -> tuple[str, ...]:
        """Returns the splits of `kind` ("labels" or "images") outside `HOME_SPLITS`."""
        return tuple(s for s in getattr(self, kind) if s not in HOME_SPLITS)


class _Away(NamedTuple):
    """One influence that breaks `clean`."""

    split: str
    kind: str
    part: str


@dataclass(frozen=True)
class Provenance:
    """What influenced each part of a result.

    Args:
        weights: what trained the parameters and the batch statistics.
        model_selection: what chose the checkpoint, or ended a stage.
        calibration: what calibrated the probabilities.
        thresholds: what chose the threshold, or the number of labels kept.
        label_embedding: what the label embedding was computed from.
        pretrained: the files that the first weights came from, each with its SHA-256;
            empty for random ones.
        label_hash: content hash of the vocabulary; empty where not known.
        datasets: content hashes of the datasets that trained the weights, sorted.
        one_batch: whether weights were trained on one batch again and again, to
            measure speed: no figure of theirs is a result.
    """

    weights: Influence = Influence()
    model_selection: Influence = Influence()
    calibration: Influence = Influence()
    thresholds: Influence = Influence()
    label_embedding: Influence = Influence()
    pretrained: str = ""
    label_hash: str = ""
    datasets: tuple[str, ...] = ()
    one_batch: bool = False

    @property
    def clean(self) -> bool:
        """True where nothing but `HOME_SPLITS`, whole, influenced any part."""
        return not self._away() and not self.one_batch

    def with_(
        self, part: str, *, labels: Iterable[str] = (), images: Iterable[str] = ()
    ) -> "Provenance":
        """Returns the record after more data influenced `part`; nothing is forgotten.

        Args:
            part: a key of `PARTS`.
            labels: names of splits whose labels were used.
            images: names of splits whose images were used without labels.

        Raises:
            InputError: `part` is not in `PARTS`, or a split has no name.
        """
        old = self._part(part)
        return self.redone(
            part,
            labels=(*old.labels, *_names(labels)),
            images=(*old.images, *_names(images)),
        )

    def redone(
        self, part: str, *, labels: Iterable[str] = (), images: Iterable[str] = ()
    ) -> "Provenance":
        """Returns the record after `part` was made anew, from these splits alone.

        For thresholds chosen again on another split. Weights that are trained further
        keep their past: use `with_` for them.

        Args:
            part: a key of `PARTS`.
            labels: names of splits whose labels were used.
            images: names of splits whose images were used without labels.

        Raises:
            InputError: `part` is not in `PARTS`, or a split has no name.
        """
        self._part(part)
        influence = Influence(_names(labels), _names(images))
        return replace(self, **{part: influence})  # pyright: ignore[reportArgumentType]

    def union(self, other: "Provenance") -> "Provenance":
        """Returns what influenced a result that both of the two went into.

        Raises:
            InputError: they are of other labels.
        """
        hashes = {self.label_hash, other.label_hash} - {""}
        if len(hashes) > 1:
            raise InputError(
                f"models of labels {' and '.join(sorted(hashes))} cannot go into one "
                "result; use models of the same labels in the same order."
            )
        record = self
        for part in PARTS:
            more = other._part(part)
            record = record.with_(part, labels=more.labels, images=more.images)
        pretrained = dict.fromkeys(filter(None, (self.pretrained, other.pretrained)))
        return replace(
            record,
            pretrained=", ".join(pretrained),
            label_hash="".join(hashes),
            datasets=tuple(sorted({*self.datasets, *other.datasets})),
            one_batch=self.one_batch or other.one_batch,
        )

    def badge(self) -> str:
        """Returns `clean`, or what broke it: `tuning labels: thresholds, weights`."""
        grouped: dict[str, list[str]] = {}
        for away in self._away():
            kind = f"{away.split} {_KINDS[away.kind]}"
            grouped.setdefault(kind, []).append(away.part.replace("_", " "))
        found = [ONE_BATCH] * self.one_batch
        found += [f"{kind}: {', '.join(parts)}" for kind, parts in grouped.items()]
        return "; ".join(found) or "clean"

    def caveats(self) -> list[str]:
        """Returns plain sentences a reader needs before trusting the figures."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for away in self._away():
            grouped.setdefault((away.split, away.kind), []).append(PARTS[away.part])
        sentences = [
            f"{_KINDS[kind].capitalize()} of the {split} split {_listed(done)}; "
            f"{_MEANING[kind].format(split=split)}."
            for (split, kind), done in grouped.items()
        ]
        if self.one_batch:
            sentences.insert(
                0,
                "The weights were trained on one batch again and again (reuse_batch); "
                "this measures speed, and no figure of it is a result.",
            )
        if self.pretrained:
            sentences.append(
                f"The first weights came from {self.pretrained}; the images they were "
                "trained on are not in this record. The Inclusive Images Challenge "
                "forbids such weights."
            )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Returns the record as lists, strings and a boolean, for `json.dumps`."""
        parts = {
            part: {kind: list(getattr(self._part(part), kind)) for kind in _KINDS}
            for part in PARTS
        }
        one_batch = {"one_batch": True} if self.one_batch else {}
        return {
            "clean": self.clean,
            **parts,
            "pretrained": self.pretrained,
            "label_hash": self.label_hash,
            "datasets": list(self.datasets),
            **one_batch,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Provenance":
        """Returns the record that `to_json` wrote.

        Args:
            record: every key of `to_json`, and no other.

        Raises:
            InputError: a key is missing, unknown or of another type, or `clean` does
                not agree with the splits listed.
        """
        # Written only where it is true.
        record = {"one_batch": False, **record}
        _check_keys(record, {"clean", *(f.name for f in fields(cls))}, "provenance")
        values: dict[str, Any] = {}
        for name in ("pretrained", "label_hash"):
            values[name] = record[name]
            if not isinstance(record[name], str):
                raise InputError(
                    f"provenance.{name} is {record[name]!r}; it must be text; "
                    "evaluate the run again."
                )
        for part in PARTS:
            _check_keys(record[part], set(_KINDS), f"provenance.{part}")
            values[part] = Influence(
                **{k: _read_names(record[part][k], f"{part}.{k}") for k in _KINDS}
            )
        values["datasets"] = _read_names(record["datasets"], "datasets")
        values["one_batch"] = record["one_batch"] is True
        result = cls(**values)
        if record["clean"] is not result.clean:
            raise InputError(
                f"provenance.clean is {record['clean']!r} but its splits say "
                f"{result.clean} ({result.badge()}); evaluate the run again."
            )
        return result

    def _part(self, part: str) -> Influence:
        if part not in PARTS:
            raise InputError(
                f"provenance has no part {part!r}; use one of {', '.join(PARTS)}."
            )
        return getattr(self, part)

    def _away(self) -> list[_Away]:
        found = [
            _Away(split, kind, part)
            for part in PARTS
            for kind in _KINDS
            for split in getattr(self, part).away(kind)
        ]
        return sorted(
            found, key=lambda a: (a.split, tuple(_KINDS).index(a.kind))
        )  # Stable: the parts stay in the order of PARTS.


def provenance_by_stage(
    start: Provenance, stages: Sequence[Stage], chosen_on: str
) -> dict[str, Provenance]:
    """Returns stage name -> what its checkpoints say; each keeps its past.

    Args:
      start: of the parameters that the first stage starts from.
      stages: in order.
      chosen_on: the split that chooses checkpoints and ends stages.
    """
    record = start
    by_stage: dict[str, Provenance] = {}
    for stage in stages:
        record = record.with_("weights", labels=[stage.split])
        record = record.with_("model_selection", labels=[chosen_on])
        if stage.embedding_head:
            record = record.with_("label_embedding", labels=["train"])
        by_stage[stage.name] = record
    return by_stage


def _names(splits: Iterable[str]) -> tuple[str, ...]:
    # A lone string is an iterable of letters; it is always a slip of the caller's.
    names = () if isinstance(splits, str) else tuple(splits)
    if isinstance(splits, str) or not all(names):
        raise InputError(
            f"splits {splits!r}; give a list of names, such as ['validation']."
        )
    return tuple(sorted(set(names)))


def _read_names(value: Any, where: str) -> tuple[str, ...]:
    names = cast(list[Any], value) if isinstance(value, list) else [""]
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(
            f"provenance.{where} is {value!r}; it must be a list of names; "
            "evaluate the run again."
        )
    return _names(names)


def _check_keys(record: Any, allowed: set[str], where: str) -> None:
    if not isinstance(record, Mapping):
        raise InputError(
            f"{where} is {record!r}; it must be an object; evaluate the run again."
        )
    keys = set(cast(Mapping[str, Any], record))
    unknown, missing = sorted(keys - allowed), sorted(allowed - keys)
    if unknown or missing:
        raise InputError(
            f"{where} has unknown keys {unknown} and lacks {missing}; it must hold "
            f"{', '.join(sorted(allowed))}; evaluate the run again."
        )


def _listed(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
