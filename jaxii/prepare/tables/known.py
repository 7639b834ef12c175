"""Finds the labels of a trained run among those of a label file."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.rows import clean


class KnownLabels:
    """The labels of a run, by code and by name.

    A code counts before an equal name. Names that several labels share are ignored.

    Args:
      vocabulary: The labels.
      fold_case: Whether case is ignored for labels that the run does not have as they
        are written, unless they then fit several labels of the run.
    """

    def __init__(self, vocabulary: Vocabulary, *, fold_case: bool = False):
        self.vocabulary = vocabulary
        self._fold_case = fold_case
        names = list(map(clean, vocabulary.descriptions))
        codes = list(map(clean, vocabulary.codes))
        count = Counter(names)
        self._ids = {name: i for i, name in enumerate(names) if count[name] == 1}
        self._ids |= {code: i for i, code in enumerate(codes)}
        self._folded: dict[str, set[int]] = defaultdict(set)
        for texts in (names, codes):
            for i, text in enumerate(texts):
                self._folded[text.casefold()].add(i)

    def has(self, label: str) -> bool:
        """Returns whether the run has a label of this code or name."""
        return self._find(label) is not None

    def num_fitting(self, label: str) -> int:
        """Returns the number of labels of the run that fit if case is ignored."""
        return len(self._folded.get(clean(label).casefold(), ()))

    def index(self, labels: Iterable[str], notes: Notes) -> dict[str, int]:
        """Returns the id of each label that the run has; notes the others.

        Raises:
          InputError: If the run has none of the labels.
        """
        labels = sorted(labels)
        found = {label: self._find(label) for label in labels}
        known = {label: i for label, i in found.items() if i is not None}
        unknown = [label for label in labels if label not in known]
        if not known:
            raise InputError(
                f"the run has none of the labels {shown(unknown)}; its labels are "
                f"{shown(self.vocabulary.descriptions)}."
            )
        notes.left_out("labels", unknown, " that the run does not have")
        cased = [label for label in unknown if self.num_fitting(label) == 1]
        if cased:
            notes.check(
                f"{len(cased):,} of them differ only in case from labels of the run "
                f"(--fold_case matches them): {shown(cased)}"
            )
        unclear = [label for label in unknown if self.num_fitting(label) > 1]
        if unclear:
            notes.check(
                f"{len(unclear):,} of them match several labels of the run if case is "
                f"ignored; use the codes of the labels: {shown(unclear)}"
            )
        missing = len(self.vocabulary) - len(set(known.values()))
        if missing:
            notes.found(f"{missing:,} labels of the run occur in no image")
        return known

    def _find(self, label: str) -> int | None:
        label = clean(label)
        if label in self._ids or not self._fold_case:
            return self._ids.get(label)
        fitting = self._folded.get(label.casefold(), set())
        return min(fitting) if len(fitting) == 1 else None
