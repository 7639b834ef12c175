"""Augmented training images with their labels, shown at the start of a stage."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import jax
import numpy as np
from jaxtyping import Float, UInt8

from jaxii.train.step import StepSettings, examples

ROWS = COLUMNS = 4
GAP_PIXELS = 2
# Smaller soft targets are not shown.
LEAST_TARGET = 0.05


class Images(NamedTuple):
    """A grid of images, row by row, and a caption for each."""

    pixels: UInt8[np.ndarray, "height width 3"]
    captions: tuple[str, ...]


def make_images(
    settings: StepSettings, names: Sequence[str]
) -> Callable[[Mapping[str, np.ndarray]], Images]:
    """Returns a function from this process's host batch to its first augmented images.

    Compiles augmentation once more, for a few images on one device.

    Args:
      settings: Settings of the train step.
      names: Names of the labels, in order.
    """
    prepare = jax.jit(lambda batch: examples(settings, batch)[:2])
    most = ROWS * COLUMNS

    def show(batch):
        share = len(batch["images"]) // jax.local_device_count()
        # An image is mixed with the next one on its device, the last with the first;
        # one extra row makes all shown images the same as in training.
        rows = min(share, most + 1)
        images, targets = jax.device_get(
            prepare({name: value[:rows] for name, value in batch.items()})
        )
        shown = range(min(rows, most))
        return Images(
            pixels=grid(images[: len(shown)]),
            captions=tuple(_caption(targets[i], names) for i in shown),
        )

    return show


def grid(
    images: UInt8[np.ndarray, "image height width 3"],
) -> UInt8[np.ndarray, "total_height total_width 3"]:
    """Returns a grid of images, four in a row, with gaps between them."""
    count, height, width, _ = images.shape
    rows = -(-count // COLUMNS)
    tall, wide = height + GAP_PIXELS, width + GAP_PIXELS
    whole = np.zeros((rows * tall, min(count, COLUMNS) * wide, 3), np.uint8)
    for i, image in enumerate(images):
        top, left = i // COLUMNS * tall, i % COLUMNS * wide
        whole[top : top + height, left : left + width] = image
    return whole[:-GAP_PIXELS, :-GAP_PIXELS]


def png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encodes an image as PNG."""
    _, encoded = cv2.imencode(".png", pixels[..., ::-1])
    return encoded.tobytes()


def _caption(target: Float[np.ndarray, " class"], names: Sequence[str]) -> str:
    words = []
    for label in np.argsort(-target, kind="stable").tolist():
        value = float(target[label])
        if value >= LEAST_TARGET:
            words.append(
                names[label] if value >= 1.0 else f"{names[label]} {value:.0%}"
            )
    return ", ".join(words) or "no label"
