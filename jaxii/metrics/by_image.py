"""F2 of each image, and the few images that a decoder answered best and worst.

Before it: `scores` has a batch's answers. After it: `bootstrap` draws from the F2 of
all, and the report shows the few.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

MOST_SHOWN = 9
"""Images of a kind that are kept, best or worst."""


@dataclass(frozen=True)
class Answered:
    """An image and its answer.

    Attributes:
      row: in the split.
      f2: of the answer.
      num_true: labels that are present.
      label_ids: predicted, the most probable first.
    """

    row: int
    f2: float
    num_true: int
    label_ids: Int[np.ndarray, " label"]


class ImageScores:
    """Takes a split's answers batch by batch.

    Memory: 8 bytes an image, and a few answers of either kind.

    Args:
      num_images: of the split.
    """

    def __init__(self, num_images: int):
        self.f2 = np.zeros(num_images)
        self._num_taken = 0
        self._best: list[Answered] = []
        self._worst: list[Answered] = []

    def add(
        self,
        rows: Int[np.ndarray, " batch"],
        f2: Float[np.ndarray, " batch"],
        num_true: Int[np.ndarray, " batch"],
        chosen: Bool[np.ndarray, "batch class"],
        probs: Float[np.ndarray, "batch class"],
    ) -> None:
        """Takes a batch without padding."""
        self.f2[rows] = f2
        self._num_taken += len(rows)
        # Of equal F2 those with more labels say more; row last, so that neither the
        # order of batches nor the number of processes decides.
        best = np.lexsort((rows, -num_true, -f2))[: 2 * MOST_SHOWN]
        worst = np.lexsort((rows, -num_true, f2))[:MOST_SHOWN]

        def answered(i: int) -> Answered:
            ids = np.flatnonzero(chosen[i])
            ids = ids[np.argsort(-probs[i, ids], kind="stable")]
            return Answered(int(rows[i]), float(f2[i]), int(num_true[i]), ids)

        self._best += [answered(i) for i in best.tolist()]
        self._worst += [answered(i) for i in worst.tolist()]
        self._best.sort(key=_best_first)
        self._worst.sort(key=_worst_first)
        # Twice as many, for those that are among the worst are left out at the end.
        del self._best[2 * MOST_SHOWN :], self._worst[MOST_SHOWN:]

    def best(self) -> list[Answered]:
        """Returns the best, best first; no image is among the worst too."""
        worst = {image.row for image in self.worst()}
        best = [image for image in self._best if image.row not in worst]
        return best[:MOST_SHOWN]

    def worst(self) -> list[Answered]:
        """Returns the worst, worst first; at most half of the images taken."""
        return self._worst[: min(MOST_SHOWN, -(-self._num_taken // 2))]


def _best_first(image: Answered) -> tuple[float, int, int]:
    return -image.f2, -image.num_true, image.row


def _worst_first(image: Answered) -> tuple[float, int, int]:
    return image.f2, -image.num_true, image.row
