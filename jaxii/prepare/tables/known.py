"""Finds the labels of a trained run among those of a label file."""

from collections import Counter
from collections.abc import Iterable

from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.rows import clean


class KnownLabels:
    """The labels of a run, by code and by name.

    Names that several labels share are ignored.

    Args:
      vocabulary: The labels.
      fold_case: Whether case is ignored.
    """

    def __init__(self, vocabulary: Vocabulary, *, fold_case: bool = False):
        self.vocabulary = vocabulary
        self._fold_case = fold_case
        names = list(map(self._key, vocabulary.descriptions))
        count = Counter(names)
        self._ids = {name: i for i, name in enumerate(names) if count[name] == 1}
        self._ids |= {self._key(code): i for i, code in enumerate(vocabulary.codes)}

    def has(self, label: str) -> bool:
        """Returns whether the run has a label of this code or name."""
        return self._key(label) in self._ids

    def index(self, labels: Iterable[str], notes: Notes) -> dict[str, int]:
        """Returns the id of each label that the run has; notes the others.

        Raises:
          InputError: If the run has none of the labels.
        """
        labels = sorted(labels)
        known = {k: self._ids[self._key(k)] for k in labels if self.has(k)}
        unknown = [label for label in labels if label not in known]
        if not known:
            raise InputError(
                f"the run knows none of the labels {shown(unknown)}; its labels are "
                f"{shown(self.vocabulary.descriptions)}."
            )
        notes.left_out("labels", unknown, " that the run does not know")
        folded = {name.casefold() for name in self._ids}
        cased = [label for label in unknown if label.casefold() in folded]
        if cased:
            notes.check(
                f"{len(cased):,} of them differ only in case from labels of the run "
                f"(--fold_case takes them as those): {shown(cased)}"
            )
        missing = len(self.vocabulary) - len(set(known.values()))
        if missing:
            notes.found(f"{missing:,} labels of the run are in no image")
        return known

    def _key(self, label: str) -> str:
        label = clean(label)
        return label.casefold() if self._fold_case else label
