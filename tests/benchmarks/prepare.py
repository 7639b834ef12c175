"""Times `prepare`: images a second a core, and bytes before and after.

    python -m tests.benchmarks.prepare

Pictures of 1024 x 768 pixels are made first, with the spectrum and the file size of
photographs (300 KB, as in Open Images), which is not counted. Processor time is divided
by the images, so that other work on the machine hardly changes the figure; the network
is in neither.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg

from jaxii.data.layout import Layout
from jaxii.data.open_images import prepare

HEIGHT, WIDTH = 768, 1024


def picture(rng: np.random.Generator) -> bytes:
    """Returns a JPEG of noise whose spectrum falls as that of photographs does."""
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--short_side", type=int, default=256)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "kaggle")
        (root / "train").mkdir(parents=True)
        pictures = [picture(rng) for _ in range(20)]
        rows = ["ImageID,Source,LabelName,Confidence"]
        before = 0
        for i in range(args.images):
            content = pictures[i % len(pictures)]
            (root / "train" / f"{i:06d}.jpg").write_bytes(content)
            rows.append(f"{i:06d},verification,/m/cat,1")
            before += len(content)
        (root / "classes-trainable.csv").write_text("label_code\n/m/cat\n")
        (root / "train_human_labels.csv").write_text("\n".join(rows) + "\n")
        layout, out = Layout.find(root), Path(scratch, "out")
        used, passed = time.process_time(), time.monotonic()
        prepare(layout, out, short_side=args.short_side)
        used, passed = time.process_time() - used, time.monotonic() - passed
        after = sum(path.stat().st_size for path in out.glob("*array_record*"))
    print(f"{args.images / used:.0f} images/s a core (processor time)")
    print(f"{args.images / passed:.0f} images/s on this machine now")
    print(f"{before / args.images / 1e3:.0f} KB an image read, ", end="")
    print(f"{after / args.images / 1e3:.0f} KB written")


if __name__ == "__main__":
    main()
