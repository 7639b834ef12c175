"""What looking at data found and assumed, in the order in which a person reads it."""

from collections.abc import Iterable, Sequence

from jaxii.prepare.tally import few

FOUND, ASSUMED, LEFT_OUT, MIND = "found", "assumed", "left out", "mind"


class Notes:
    """Lines of what was found, assumed and left out.

    Attributes:
      lines: so far.
    """

    def __init__(self):
        self.lines: list[str] = []

    def found(self, text: str) -> None:
        """Notes a fact."""
        self._add(FOUND, text)

    def assumed(self, text: str) -> None:
        """Notes a choice that the data did not make; the text says how to change it."""
        self._add(ASSUMED, text)

    def left_out(self, what: str, items: Sequence[str], why: str = "") -> None:
        """Notes what is not used, where there is any, with the first few of it."""
        if items:
            self._add(LEFT_OUT, f"{len(items):,} {what}{why}: {shown(items)}")

    def mind(self, text: str) -> None:
        """Notes what is used as it is and may be a mistake."""
        self._add(MIND, text)

    def _add(self, kind: str, text: str) -> None:
        self.lines.append(f"{kind:10}{text}")


def shown(items: Iterable[str]) -> str:
    """Returns the first few, quoted: no control character reaches a terminal."""
    items = list(items)
    more = ", ..." if len(items) > len(few(items)) else ""
    return ", ".join(repr(_short(item)) for item in few(items)) + more


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:87]}..."
