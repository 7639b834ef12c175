"""What is said of a checkpoint that could not be saved.

Raised by `checkpoint` and told by `loop`, which goes on without it, or by `main`.
"""

import contextlib
import os
import re

from etils import epath


class FailedSave(Exception):
    """A checkpoint could not be saved; those that were complete still are.

    Args:
      folder: of the stage's checkpoints.
      step: of the checkpoint.
      error: what went wrong.

    Attributes:
      last: step of the last complete checkpoint of the stage, None if there is none.
    """

    def __init__(self, folder: epath.Path, step: int, error: Exception):
        self.last = _last(folder)
        if self.last is None:
            rest = "starts anew: no checkpoint is complete yet"
        else:
            rest = f"goes on from step {self.last}, which is complete"
        super().__init__(
            f"saving the checkpoint of step {step} in {folder} failed: "
            f"{_reason(error)}. See to the space and the permissions there; the same "
            f"command {rest}."
        )


def _last(folder: epath.Path) -> int | None:
    with contextlib.suppress(OSError):
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        return max(steps, default=None)


def _reason(error: Exception) -> str:
    """Returns the system's own words for what went wrong, where there are some."""
    text = str(error).partition("\n")[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore's errors name several files before they say it.
    found = re.search(r"os_error_code='(\d+)'", text)
    if found:
        return os.strerror(int(found[1]))
    return text[:200] or type(error).__name__
