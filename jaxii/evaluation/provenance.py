"""The data that influenced a result: labels and unlabelled images, by split and part.

A record grows while the label embedding, the weights, the checkpoint, the calibration
and the thresholds are made. It is kept in checkpoints, the label embedding's file,
`metrics.json`, the report and beside submissions, and states whether only training data
influenced the result.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from jaxii.errors import InputError
from jaxii.train.stages import Stage

HOME_SPLITS = ("train", "validation", "held_out")
"""Splits of the training data; a result stays clean if only they influence it.

`held_out` is a domain of the training data that is kept out of training."""

PARTS = {
    "weights": "shaped the weights",
    "model_selection": "selected the checkpoint",
    "calibration": "calibrated the probabilities",
    "thresholds": "chose the thresholds",
    "label_embedding": "entered the label embedding",
}
"""The parts of a result that data can influence, and the phrases for it."""

_KINDS = {"labels": "labels", "images": "images without labels"}
_MEANING = {
    "labels": "figures on {split} do not represent unseen data, and no figure "
    "represents a domain without labels",
    "images": "figures on {split} represent images that the model may see before it "
    "predicts them",
}


@dataclass(frozen=True)
class Influence:
    """The splits that influenced one part of a result.

    Args:
        labels: sorted names of splits whose labels and images were used.
        images: sorted names of splits whose images were used without labels.
    """

    labels: tuple[str, ...] = ()
    images: tuple[str, ...] = ()

    def away(self, kind: str) -> tuple[str, ...]:
        """Returns the splits of `kind` ("labels" or "images") outside `HOME_SPLITS`."""
        return tuple(s for s in getattr(self, kind) if s not in HOME_SPLITS)


@dataclass(frozen=True)
class Provenance:
    """The data that influenced each part of a result.

    Args:
        weights: data that trained the parameters and the batch statistics.
        model_selection: data that chose the checkpoint or ended a stage.
        thresholds: data that chose the threshold, or the number of labels kept.
        pretrained: the files of the first weights, each with its SHA-256; empty for
            random weights.
        label_hash: content hash of the vocabulary; empty if unknown.
        datasets: sorted content hashes of the datasets that trained the weights.
        one_batch: whether weights were trained on one batch repeatedly, to measure
            speed; none of their figures is a result.
        batch_sizes: sorted batch sizes, in words, of models that were not trained with
            the one of their configuration throughout.
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
    batch_sizes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """True if only `HOME_SPLITS` influenced any part."""
        return not self._away() and not self.one_batch

    @property
    def uses_target_labels(self) -> bool:
        """Whether labels of other splits shaped the weights or chose the checkpoint."""
        return any(part.away("labels") for part in (self.weights, self.model_selection))

    def with_(
        self, part: str, *, labels: Iterable[str] = (), images: Iterable[str] = ()
    ) -> "Provenance":
        """Returns the record after more data influenced `part`.

        Args:
            part: a key of `PARTS`.
            labels: names of splits whose labels were used.
            images: names of splits whose images were used without labels.

        Raises:
            InputError: If `part` is not in `PARTS`, or a split has no name.
        """
        old = self._part(part)
        influence = Influence(
            _names([*old.labels, *_names(labels)]),
            _names([*old.images, *_names(images)]),
        )
        return replace(self, **{part: influence})  # pyright: ignore[reportArgumentType]

    def union(self, other: "Provenance") -> "Provenance":
        """Returns the record of a result that two models contributed to.

        Raises:
            InputError: If their labels differ.
        """
        hashes = {self.label_hash, other.label_hash} - {""}
        if len(hashes) > 1:
            raise InputError(
                f"models with different labels (hashes {' and '.join(sorted(hashes))}) "
                "cannot be combined; use models with the same labels in the same order."
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
            batch_sizes=tuple(sorted({*self.batch_sizes, *other.batch_sizes})),
        )

    def badge(self) -> str:
        """Returns `clean` or the reason, e.g. `tuning labels: weights, thresholds`."""
        found = ["no result: one batch"] * self.one_batch
        for (split, kind), parts in self._away().items():
            listed = ", ".join(part.replace("_", " ") for part in parts)
            found.append(f"{split} {_KINDS[kind]}: {listed}")
        return "; ".join(found) or "clean"

    def caveats(self) -> list[str]:
        """Returns sentences that a reader needs before trusting the figures."""
        sentences: list[str] = []
        if self.one_batch:
            sentences.append(
                "The weights were trained on a single batch repeatedly (reuse_batch); "
                "this measures speed, and none of its figures is a result."
            )
        for (split, kind), parts in self._away().items():
            done = _listed([PARTS[part] for part in parts])
            sentences.append(
                f"{_KINDS[kind].capitalize()} of the {split} split {done}; "
                f"{_MEANING[kind].format(split=split)}."
            )
        if self.batch_sizes:
            sentences.append(
                "The weights were trained with batches of "
                f"{' and of '.join(self.batch_sizes)}; the configuration has only the "
                "last batch size."
            )
        if self.pretrained:
            sentences.append(
                f"The initial weights came from {self.pretrained}; this record does "
                "not cover the images they were trained on. The Inclusive Images "
                "Challenge forbids such weights."
            )
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Returns the record as lists, strings and booleans."""
        parts = {
            part: {kind: list(getattr(self._part(part), kind)) for kind in _KINDS}
            for part in PARTS
        }
        optional = {"one_batch": self.one_batch, "batch_sizes": [*self.batch_sizes]}
        return {
            "clean": self.clean,
            **parts,
            "pretrained": self.pretrained,
            "label_hash": self.label_hash,
            "datasets": list(self.datasets),
            **{name: value for name, value in optional.items() if value},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Provenance":
        """Returns the record that `to_json` wrote.

        Raises:
            InputError: If a key is missing, unknown or of another type, or `clean`
                contradicts the splits listed.
        """
        # Written only if they are true, or not empty.
        record = {"one_batch": False, **record}
        batch_sizes = record.pop("batch_sizes", [])
        names = {"clean", *(f.name for f in fields(cls))} - {"batch_sizes"}
        _check_keys(record, names, "provenance")
        values: dict[str, Any] = {**record, "one_batch": record["one_batch"] is True}
        recorded_clean = values.pop("clean")
        for name in ("pretrained", "label_hash"):
            if not isinstance(record[name], str):
                raise InputError(
                    f"provenance.{name} is {record[name]!r}; it must be a string; "
                    "evaluate the run again."
                )
        for part in PARTS:
            _check_keys(record[part], set(_KINDS), f"provenance.{part}")
            values[part] = Influence(
                **{k: _read_names(record[part][k], f"{part}.{k}") for k in _KINDS}
            )
        values["datasets"] = _read_names(record["datasets"], "datasets")
        values["batch_sizes"] = _read_names(batch_sizes, "batch_sizes")
        result = cls(**values)
        if recorded_clean is not result.clean:
            raise InputError(
                f"provenance.clean is {recorded_clean!r}, but its splits imply "
                f"{result.clean} ({result.badge()}); evaluate the run again."
            )
        return result

    def _part(self, part: str) -> Influence:
        if part not in PARTS:
            raise InputError(
                f"provenance has no part {part!r}; use one of {', '.join(PARTS)}."
            )
        return getattr(self, part)

    def _away(self) -> dict[tuple[str, str], list[str]]:
        """Returns (split, kind) -> influenced parts, for splits that break `clean`."""
        found: dict[tuple[str, str], list[str]] = {}
        for kind in _KINDS:
            for part in PARTS:
                for split in self._part(part).away(kind):
                    found.setdefault((split, kind), []).append(part)
        # Stable: the labels of a split stay before its images.
        return dict(sorted(found.items(), key=lambda item: item[0][0]))


def provenance_by_stage(
    start: Provenance, stages: Sequence[Stage], chosen_on: str
) -> dict[str, Provenance]:
    """Returns stage name -> record of its checkpoints, with those of earlier stages.

    Args:
      start: record of the parameters that the first stage starts from.
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
    names = tuple(splits)
    # A lone string is an iterable of letters.
    if isinstance(splits, str) or not all(names):
        raise InputError(
            f"splits={splits!r} is invalid; use a list of names, such as "
            "['validation']."
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
    is_object = isinstance(record, Mapping)
    keys = set(cast(Mapping[str, Any], record)) if is_object else set[str]()
    if keys != allowed:
        raise InputError(
            f"{where} has the keys {', '.join(sorted(keys)) or 'none'}; it must be an "
            f"object with the keys {', '.join(sorted(allowed))}; evaluate the run "
            "again."
        )


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
