"""Notes on what was found, assumed and left out while reading data."""

from collections.abc import Iterable, Sequence

from jaxii.prepare.tally import few

FOUND, ASSUMED, LEFT_OUT, CHECK = "found", "assumed", "left out", "check"


class Notes:
    """Lines of notes, each with its kind."""

    def __init__(self):
        self.lines: list[str] = []

    def found(self, text: str) -> None:
        """Notes a fact."""
        self._add(FOUND, text)

    def assumed(self, text: str) -> None:
        """Notes an assumption; the text says how to change it."""
        self._add(ASSUMED, text)

    def left_out(self, what: str, items: Sequence[str], why: str = "") -> None:
        """Notes unused items, if any, with the first few of them."""
        if items:
            self._add(LEFT_OUT, f"{len(items):,} {what}{why}: {shown(items)}")

    def check(self, text: str) -> None:
        """Notes a possible mistake in the data, which is used as it is."""
        self._add(CHECK, text)

    def _add(self, kind: str, text: str) -> None:
        self.lines.append(f"{kind:10}{text}")


def shown(items: Iterable[str]) -> str:
    """Returns the first few items, quoted, without control characters."""
    items = list(items)
    more = ", ..." if len(items) > len(few(items)) else ""
    return ", ".join(repr(_short(item)) for item in few(items)) + more


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:87]}..."
