"""What a run predicts for images, as rows and as a table."""

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The labels of one image, the most probable first.

    Attributes:
      image: path of the image, or its number.
      labels: codes of the labels.
      names: names of the labels.
      scores: probability of each.
    """

    image: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    scores: tuple[float, ...]


class Predictions(tuple[Prediction, ...]):
    """The predictions of some images, in the order given."""

    __slots__ = ()

    def to_frame(self) -> pl.DataFrame:
        """Returns a row an image: image, labels, names and scores."""
        return pl.DataFrame(
            {
                "image": [row.image for row in self],
                "labels": [list(row.labels) for row in self],
                "names": [list(row.names) for row in self],
                "scores": [list(row.scores) for row in self],
            },
            schema={
                "image": pl.String,
                "labels": pl.List(pl.String),
                "names": pl.List(pl.String),
                "scores": pl.List(pl.Float64),
            },
        )
