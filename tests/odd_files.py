"""Files with names of images that cannot be read as images; a program that tries.

    python tests/odd_files.py FOLDER

Reads FOLDER, which `write` made, with `prepare`, `new` and the reader of `predict`, and
prints their messages about the files as JSON. It is a process of its own, because code
that opens a pipe waits for ever and cannot be stopped in a thread.
"""

import contextlib
import io
import json
import os
import stat
import sys
from pathlib import Path

import small_layout

# Name -> the message about it.
FAULTS = {
    "a_pipe.jpg": "not a regular file",
    "a_socket.jpg": "not a regular file",
    "endless.jpg": "not a regular file",
    "random.jpg": "not a regular file",
    "sparse.jpg": "40,000,000,000 bytes; at most 256 MiB are read",
    "dangling.jpg": "no such file",
    "looping.jpg": "a link to itself",
}
# Only in a list of paths.
LISTED_FAULTS = {
    "http://x.org/a.jpg": "an address; images are read from disks and gs:// buckets",
    "s3://x/a.jpg": "an address; images are read from disks and gs:// buckets",
    "x" * 5000 + ".jpg": "a name too long for a file",
    "a_folder.jpg": "a folder",
    "nowhere/a.jpg": "no such file",
}
NOT_UTF8 = b"not_utf8_\xff.jpg"


def make(folder: Path) -> None:
    """Makes the files of `FAULTS`, and one whose name is not UTF-8."""
    os.mkfifo(folder / "a_pipe.jpg")
    os.mknod(folder / "a_socket.jpg", stat.S_IFSOCK | 0o600)
    (folder / "endless.jpg").symlink_to("/dev/zero")
    (folder / "random.jpg").symlink_to("/dev/urandom")
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 40_000_000_000)
    (folder / "dangling.jpg").symlink_to("gone.jpg")
    (folder / "looping.jpg").symlink_to("looping.jpg")
    with open(os.fsencode(folder) + b"/" + NOT_UTF8, "wb") as file:  # noqa: PTH123
        file.write(small_layout.jpeg(99))


def write(root: Path) -> Path:
    """Writes a small layout with odd files among the training and test images."""
    small_layout.write(root)
    make(root / "train" / "part_0")
    (root / "stage_1_test_images" / "dangling_test.jpg").symlink_to("gone.jpg")
    os.mkfifo(root / "stage_1_test_images" / "pipe_test.jpg")
    with (root / "train_human_labels.csv").open("a") as file:
        file.writelines(f"{Path(n).stem},verification,/m/cat,1\n" for n in FAULTS)
    names = [f"train{i:02d}.jpg" for i in range(6)]
    rows = [f"{name},{'cat' if i % 2 else 'dog'}" for i, name in enumerate(names)]
    rows += [f"{name},cat" for name in FAULTS]
    small_layout.lines(root / "rows.csv", "path,label", *rows)
    return root


def main(root: Path) -> None:
    from jaxii.evaluation import image_records
    from jaxii.evaluation.image_records import ImageFiles
    from jaxii.prepare.kaggle import Layout, prepare
    from jaxii.prepare.tables import images

    layout = Layout.find(root, sample_submission=None)
    counts = prepare(layout, root / "prepared")
    folder = root / "train" / "part_0"
    files = ImageFiles(image_records.find(str(folder)), 64)
    found = {"counts": counts.lines(), "new": _new(root), "headers": {}, "predict": {}}
    images.MOST_DECODED = 0
    paths = [str(folder / name) for name in FAULTS]
    found["headers"] = images.check(paths).broken
    for row, name in enumerate(files.listing.names):
        found["predict"][ascii(name)] = files.fault(row)
    print(json.dumps(found))


def _new(root: Path) -> str:
    from jaxii.prepare.new import new
    from jaxii.prepare.recipe import Pace

    pace = Pace(images_per_second=100.0, start_seconds=1.0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        new(
            root / "mine",
            images=root / "train",
            labels=root / "rows.csv",
            path_column="",
            label_column="",
            label_separator="",
            fold_case=False,
            min_images=1,
            platform="cpu",
            num_devices=1,
            fast_bfloat16=False,
            pace_of=lambda fields: pace,
        )
    return said.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
