"""`Draft`: the rows of an unfinished output, kept so that a prediction can continue.

The rows are in a hidden folder beside the output, in pieces that are written once.
Objects in a bucket cannot be appended to, so this works there, too.
"""

import contextlib
import glob
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from jaxii.storage import LOCK, AnyPath, check_held, held, names_in, write_text

# Raise it when the content of pieces, or of outputs of one identity, changes.
FORMAT = 1
# A killed process loses the answers of at most this time.
SAVE_SECONDS = 60.0
# Text of a piece, which is held in memory.
MOST_CHARACTERS = 1 << 26
# JSON that describes the rows so far, such as sums over them.
State = dict[str, Any]


@contextmanager
def open_draft(
    output: AnyPath,
    identity: str,
    *,
    state: Callable[[], State | None],
    batch_size: int,
    num_rows: int,
) -> Generator["Draft", None, None]:
    """Holds an output for this process, and yields its draft.

    Args:
      output: The file that will have the rows.
      identity: Digest of everything that decides the rows; pieces with another one are
        removed. "" removes all pieces.
      state: Returns the state after the last row taken; None for one not worth keeping.
      batch_size: Pieces end after a multiple of this number of rows.
      num_rows: Rows of the complete output.

    Raises:
      InputError: If another process holds the output.
    """
    folder = output.with_name(f".{output.name}.part")
    try:
        with held(folder):
            _remove_unfinished(output)
            yield Draft(folder, identity, state, batch_size, num_rows)
    finally:
        if isinstance(folder, Path):
            with contextlib.suppress(OSError):  # it has pieces
                folder.rmdir()


def _remove_unfinished(output: AnyPath) -> None:
    """Removes files that killed processes left while they wrote a local output."""
    if isinstance(output, Path):
        for path in output.parent.glob(f".{glob.escape(output.name)}.????????.part"):
            path.unlink()


class Draft:
    """Rows of an output as text; see `open_draft`.

    Attributes:
      folder: Folder of the pieces.
      num_rows: Number of rows taken, at first those of the pieces found.
      found: The state after the pieces found; {} if there are none.
    """

    def __init__(
        self,
        folder: AnyPath,
        identity: str,
        state: Callable[[], State | None],
        batch_size: int,
        num_rows: int,
    ):
        self.folder = folder
        self.num_rows = 0
        self.found: State = {}
        self._identity = identity
        self._state = state
        self._batch_size = batch_size
        self._all_rows = num_rows
        self._pieces: list[AnyPath] = []
        self._rest: list[str] = []
        while self._identity and (piece := self._read_next()):
            self.num_rows, self.found = piece["num_rows"], piece["state"]
            self._pieces.append(self._next)
        self._remove(kept={path.name for path in self._pieces})

    def completed(self, lines: Iterable[str]) -> Iterator[str]:
        """Takes the remaining rows and saves pieces meanwhile; returns all rows."""
        last, characters = time.monotonic(), 0
        for line in lines:
            self._rest.append(line)
            self.num_rows += 1
            characters += len(line)
            # After the last row only the output is left to write.
            if self.num_rows % self._batch_size or self.num_rows == self._all_rows:
                continue
            late = time.monotonic() - last >= SAVE_SECONDS
            if late or characters >= MOST_CHARACTERS:
                self._save()
                last, characters = time.monotonic(), 0
        check_held(self.folder)
        return self._rows()

    def remove(self) -> None:
        """Removes the pieces, once the output is written."""
        self._remove(kept=set())

    @property
    def _next(self) -> AnyPath:
        return self.folder / f"{len(self._pieces):06}.json"

    def _rows(self) -> Iterator[str]:
        for path in self._pieces:
            yield json.loads(path.read_bytes())["rows"]
        yield from self._rest

    def _save(self) -> None:
        state = self._state()
        if state is None:
            return
        check_held(self.folder)
        piece = {
            "identity": self._identity,
            "num_rows": self.num_rows,
            "state": state,
            "rows": "".join(self._rest),
        }
        write_text(self._next, json.dumps(piece))
        self._pieces.append(self._next)
        self._rest.clear()

    def _read_next(self) -> State | None:
        """Returns the next piece of this prediction; None if it is not complete."""
        try:
            piece: object = json.loads(self._next.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(piece, dict):
            return None
        piece = cast(State, piece)
        return piece if piece.get("identity") == self._identity else None

    def _remove(self, kept: set[str]) -> None:
        for name in names_in(self.folder) - kept - {LOCK}:
            (self.folder / name).unlink()
