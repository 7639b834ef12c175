"""A handful of labelled images in the Inclusive Images layout, for the data tests."""

from pathlib import Path

import numpy as np
import simplejpeg

CODES = ("/m/cat", "/m/dog", "/m/boat")


def jpeg(shade: int, height: int = 24, width: int = 32) -> bytes:
    """Returns a JPEG of one shade of grey with a little texture."""
    image = np.full((height, width, 3), shade, np.uint8)
    image[::4] += 8
    return simplejpeg.encode_jpeg(image, quality=95)


def named(encoded: bytes, text: str) -> bytes:
    """Returns a JPEG with a comment, so that equal images have different bytes."""
    comment = text.encode()
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    return encoded[:2] + segment + encoded[2:]


def write(root: Path, *, num_train: int = 6) -> Path:
    """Writes `num_train` training images, 2 tuning images and 3 test images."""
    train, test = root / "train" / "part_0", root / "stage_1_test_images"
    train.mkdir(parents=True)
    test.mkdir()
    for i in range(num_train):
        put(train, f"train{i:02d}", jpeg(20 + 7 * (i % 20)))
    for i in range(2):
        put(test, f"tune{i}", jpeg(120 + i))
    for i in range(3):
        put(test, f"test{i}", jpeg(180 + i))
    rows = [f"train{i:02d},verification,{CODES[i % 3]},1" for i in range(num_train)]
    header = "ImageID,Source,LabelName,Confidence"
    lines(root / "train_human_labels.csv", header, *rows)
    machine = "train00,machine,/m/boat,0.7", "train01,machine,/m/dog,0.4"
    lines(root / "train_machine_labels.csv", header, *machine)
    lines(root / "classes-trainable.csv", "label_code", *CODES)
    described = "/m/cat,Cat", "/m/dog,Dog", "/m/boat,Boat", "/m/rare,Rare"
    lines(root / "class-descriptions.csv", "label_code,description", *described)
    lines(root / "tuning_labels.csv", "tune0,/m/cat /m/dog", "tune1,/m/boat")
    submission = "test0,", "test1,", "test2,"
    lines(root / "stage_1_sample_submission.csv", "image_id,labels", *submission)
    return root


def put(folder: Path, image_id: str, encoded: bytes) -> None:
    """Writes an image whose bytes no other image id has."""
    (folder / f"{image_id}.jpg").write_bytes(named(encoded, image_id))


def lines(path: Path, *rows: str) -> Path:
    """Writes lines of text."""
    path.write_text("\n".join(rows) + "\n")
    return path
