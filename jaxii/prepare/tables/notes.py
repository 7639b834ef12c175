"""Notes on what was found, assumed and left out while reading data."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from jaxii.console import say
from jaxii.prepare.tally import few


class Notes:
    """Lines of notes, each with its kind."""

    def __init__(self):
        self.lines: list[str] = []

    @contextmanager
    def printed(self) -> Iterator[None]:
        """Prints the notes on exit, also after an error, which they help to explain."""
        try:
            yield
        finally:
            for line in self.lines:
                say(line)

    def found(self, text: str) -> None:
        """Notes a fact."""
        self._add("found", text)

    def assumed(self, text: str) -> None:
        """Notes an assumption; the text says how to change it."""
        self._add("assumed", text)

    def left_out(self, what: str, items: Sequence[str], why: str = "") -> None:
        """Notes unused items, if any, and shows the first few."""
        if items:
            self._add("left out", f"{len(items):,} {what}{why}: {shown(items)}")

    def check(self, text: str) -> None:
        """Notes a possible mistake in the data, which is not changed."""
        self._add("check", text)

    def _add(self, kind: str, text: str) -> None:
        self.lines.append(f"{kind:10}{text}")


def shown(items: Iterable[str]) -> str:
    """Returns the first few items, quoted, without control characters."""
    items = list(items)
    texts = [i if len(i) <= 90 else f"{i[:87]}..." for i in few(items)]
    more = ", ..." if len(items) > len(texts) else ""
    return ", ".join(map(repr, texts)) + more
