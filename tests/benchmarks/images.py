"""Images for benchmarks, and a folder of them in the layout that `prepare` reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from jaxii.prepare.kaggle import Layout

HEIGHT, WIDTH = 768, 1024
NUM_CLASSES = 7_178
LABELS_AN_IMAGE = 4


def jpeg(rng: np.random.Generator) -> bytes:
    """Returns a JPEG of noise whose spectrum falls off like that of photographs."""
    rows = np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT
    columns = np.fft.rfftfreq(WIDTH)[None] * WIDTH
    frequency = np.hypot(rows, columns) + 1.0

    def noise(fall: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phase * frequency**-fall, s=(HEIGHT, WIDTH))
        return plane / plane.std()

    tint = np.stack([noise(2.0) for _ in range(3)], axis=-1)
    image = np.clip(110 + 45 * noise(1.25)[..., None] + 20 * tint, 0, 255)
    return simplejpeg.encode_jpeg(
        image.astype(np.uint8), quality=87, colorsubsampling="420"
    )


def write_layout(root: Path, images: Sequence[bytes], num_images: int) -> Layout:
    """Writes a folder of training images, each with a few of 7,178 labels.

    Args:
      root: Created; the images are written to its folder `train`.
      images: Used in turn until there are enough.
      num_images: Number of files.
    """
    rng = np.random.default_rng(1)
    (root / "train").mkdir(parents=True)
    rows = ["ImageID,Source,LabelName,Confidence"]
    for i in range(num_images):
        (root / "train" / f"{i:06d}.jpg").write_bytes(images[i % len(images)])
        labels = rng.choice(NUM_CLASSES, LABELS_AN_IMAGE, replace=False)
        rows += [f"{i:06d},verification,/m/{label:05d},1" for label in labels]
    codes = "".join(f"/m/{label:05d}\n" for label in range(NUM_CLASSES))
    (root / "classes-trainable.csv").write_text(f"label_code\n{codes}")
    (root / "train_human_labels.csv").write_text("\n".join(rows) + "\n")
    return Layout.find(root)
