"""Figures of each label on every split, and their file, `label_figures.csv`."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float64, Int

from jaxii.data.labels import Vocabulary
from jaxii.errors import InputError
from jaxii.metrics.average_precision import average_precision
from jaxii.metrics.f_beta import f_beta_from_counts
from jaxii.storage import AnyPath, write_beside

FILE = "label_figures.csv"
# A spreadsheet reads a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_FIGURES = ("support", "average_precision", "f2")


@dataclass(frozen=True, kw_only=True)
class SplitFigures:
    """Figures of each label on one split.

    Attributes:
      support: number of images with the label.
      average_precision: NaN if no image has the label.
      f2: F2 of the decoder in use; NaN if the label is neither present nor predicted.
    """

    support: Float64[np.ndarray, " class"]
    average_precision: Float64[np.ndarray, " class"]
    f2: Float64[np.ndarray, " class"]


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Figures of each label.

    Attributes:
      train_images: number of training images with the label; machine labels count by
        confidence.
      thresholds: thresholds of the decoder `per_class`.
    """

    vocabulary: Vocabulary
    train_images: Float64[np.ndarray, " class"]
    thresholds: Float64[np.ndarray, " class"]
    splits: Mapping[str, SplitFigures]

    def save(self, path: AnyPath) -> None:
        """Writes a CSV file with one row per label, atomically; see `as_cell`."""
        columns = {
            "label_code": [as_cell(code) for code in self.vocabulary.codes],
            "description": [as_cell(text) for text in self.vocabulary.descriptions],
            "train_images": self.train_images,
            "threshold": self.thresholds.round(6),
        }
        for split, figures in self.splits.items():
            for name in _FIGURES:
                columns[as_cell(f"{split}/{name}")] = getattr(figures, name).round(6)
        table = pl.DataFrame(columns).fill_nan(None)
        write_beside(path, table.write_csv, binary=True)


def split_figures(
    histogram: Int[np.ndarray, "kind class bin"],
    *,
    hits: Int[np.ndarray, " class"],
    predicted: Int[np.ndarray, " class"],
    support: Int[np.ndarray, " class"],
) -> SplitFigures:
    """Returns the figures of each label on a split.

    Args:
      histogram: counts by probability bin.
      hits: number of images in which the label is present and predicted.
      predicted: number of images for which the label is predicted.
      support: number of images in which the label is present.
    """
    return SplitFigures(
        support=support.astype(np.float64),
        average_precision=average_precision(histogram),
        f2=f_beta_from_counts(hits, predicted, support, zero_division=np.nan),
    )


def as_cell(text: str) -> str:
    """Returns text for a spreadsheet cell, with an apostrophe before formulas."""
    return f"'{text}" if text.startswith((*_FORMULA, "'")) else text


def _of_cell(cell: str) -> str:
    return cell.removeprefix("'")


def load(path: AnyPath) -> LabelTable:
    """Reads what `save` wrote.

    Raises:
      InputError: If the file is missing or is not a table of label figures.
    """
    try:
        table = pl.read_csv(
            io.BytesIO(path.read_bytes()),
            schema_overrides={"label_code": pl.String, "description": pl.String},
            infer_schema_length=None,
        )

        def column(name: str) -> Float64[np.ndarray, " class"]:
            return table[name].cast(pl.Float64).fill_null(np.nan).to_numpy()

        table.columns = [_of_cell(name) for name in table.columns]
        names = dict.fromkeys(n.rpartition("/")[0] for n in table.columns if "/" in n)
        codes, descriptions = (
            map(_of_cell, table[name].fill_null(""))
            for name in ("label_code", "description")
        )
        return LabelTable(
            vocabulary=Vocabulary(tuple(codes), tuple(descriptions)),
            train_images=column("train_images"),
            thresholds=column("threshold"),
            splits={
                split: SplitFigures(**{n: column(f"{split}/{n}") for n in _FIGURES})
                for split in names
            },
        )
    except (OSError, pl.exceptions.PolarsError, TypeError) as error:
        raise InputError(
            f"{path} is not a table of label figures ({str(error).splitlines()[0]}); "
            "run evaluate on its workdir again."
        ) from error
