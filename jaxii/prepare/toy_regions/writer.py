"""Draws the embedded dataset: a toy Inclusive Images challenge in Kaggle's layout.

Training images come from three regions; tuning and test images from two others, with
poorer cameras and annotators who note less. `kaggle` prepares it like the real
challenge.
"""

import csv
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from jaxii.console import OnProgress, no_progress
from jaxii.data.folder import INFO_FILE, INPUTS_FILE
from jaxii.errors import InputError
from jaxii.prepare import kaggle
from jaxii.prepare.recurring import IGNORE
from jaxii.prepare.toy_regions import annotators, paint, scenes
from jaxii.prepare.toy_regions.annotators import UNTRAINABLE, label_code
from jaxii.prepare.toy_regions.paint import Quality
from jaxii.prepare.toy_regions.scenes import LABELS, Scene
from jaxii.storage import AnyPath, locked

VERSION = 1
MARKER = "toy_regions.json"
# Modification time of every drawn image, since 1970.
_TIME_SECONDS = 1_500_000_000
_SPLITS = ("train", "tuning", "test")
_SIZES = ((96, 96), (112, 96), (96, 112), (128, 96))
_SECOND_VIEW = 0.2
_BOXED_IMAGES = 0.35
# Ranges of `Quality` for poor cameras, and for the one property that is worse in each.
_MEDIOCRE = {"blur_pixels": (0.2, 0.6), "noise": (3.0, 7.0), "exposure": (0.75, 1.05)}
_WORSE = {
    "blurred": {"blur_pixels": (0.9, 1.4)},
    "dark": {"exposure": (0.38, 0.58)},
    "grainy": {"noise": (11.0, 20.0)},
}


@dataclass(frozen=True)
class _Image:
    """An image to draw, seeded by `scene_number` and `view`."""

    split: str
    scene_number: int
    view: int
    image_id: str
    scene: Scene
    quality_name: str
    width: int
    height: int

    @property
    def domain(self) -> str:
        return self.scene.region.name


def write(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_train: int = 4000,
    num_tuning: int = 200,
    num_test: int = 1000,
    on_progress: OnProgress = no_progress,
) -> Path:
    """Draws the dataset, unless it exists already.

    The directory appears only when all files are complete. The same arguments give the
    same files, and a larger dataset begins with the images of a smaller one.

    Args:
      directory: A new or empty directory, or one with this dataset.
      seed: At least 0.
      num_train, num_tuning, num_test: Images of each split, at least 1.
      on_progress: Called with (images done, images in all, activity).

    Returns:
      The directory, with train/images, stage_1_test_images and Kaggle's label files.

    Raises:
      InputError: If the directory has other content.
    """
    directory = Path(directory)
    counts = {"train": num_train, "tuning": num_tuning, "test": num_test}
    made_with = {"version": VERSION, "seed": seed, "num_images": counts}
    if _is_complete(directory, made_with):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{directory.name}.", dir=directory.parent
    ) as scratch:
        # Not `scratch` itself, which is private whatever the umask.
        draft = Path(scratch, directory.name)
        draft.mkdir()
        _write_all(draft, seed, counts, on_progress)
        (draft / MARKER).write_text(json.dumps(made_with, indent=1) + "\n")
        try:
            draft.rename(directory)
        except OSError:
            # Another process may have finished first.
            if not _is_complete(directory, made_with):
                raise
    return directory


def _is_complete(directory: Path, made_with: dict) -> bool:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    marker = directory / MARKER
    if not marker.is_file():
        raise InputError(
            f"{directory} contains something other than a complete toy_regions "
            "dataset; use a new or empty directory"
        )
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        found = "an unreadable marker"
    if found != made_with:
        raise InputError(
            f"{directory} was drawn with {json.dumps(found)} instead of "
            f"{json.dumps(made_with)}; use another directory or delete this one"
        )
    return True


def _write_all(
    draft: Path,
    seed: int,
    counts: dict[str, int],
    on_progress: OnProgress,
) -> None:
    folders = {"train": draft / "train" / "images"}
    folders |= dict.fromkeys(("tuning", "test"), draft / "stage_1_test_images")
    for folder in (*folders.values(), draft / "truth"):
        folder.mkdir(parents=True, exist_ok=True)
    images = {split: _plan(split, count, seed) for split, count in counts.items()}
    _write_labels(draft, images, seed)
    everything = [image for split in images.values() for image in split]

    # Threads would wait for Python's global lock: two are slower than one.
    for done, image in enumerate(everything, start=1):
        path = folders[image.split] / f"{image.image_id}.jpg"
        path.write_bytes(_draw(image, seed))
        # `prepare` compares modification times.
        os.utime(path, (_TIME_SECONDS, _TIME_SECONDS))
        on_progress(done, len(everything), "drawing toy_regions")


def _rng(seed: int, split: str, scene_number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(
        (seed, VERSION, _SPLITS.index(split), scene_number, purpose)
    )


def _plan(split: str, count: int, seed: int) -> list[_Image]:
    """Returns the images of a split; some scenes have two views."""
    regions = scenes.SEEN if split == "train" else scenes.UNSEEN
    images: list[_Image] = []
    scene_number = 0
    while len(images) < count:
        rng = _rng(seed, split, scene_number, 0)
        region = regions[int(rng.integers(len(regions)))]
        views = [scenes.compose(region, rng)]
        if split == "train" and rng.random() < _SECOND_VIEW:
            views.append(scenes.another_view(views[0], rng))
        quality = "good" if split == "train" else list(_WORSE)[int(rng.integers(3))]
        size = _SIZES[int(rng.integers(len(_SIZES)))]
        for view, scene in enumerate(views[: count - len(images)]):
            name = f"{seed} {split} {scene_number} {view}"
            image_id = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
            images.append(
                _Image(split, scene_number, view, image_id, scene, quality, *size)
            )
        scene_number += 1
    return images


def _quality(name: str, rng: np.random.Generator) -> Quality:
    if name == "good":
        return Quality()
    ranges = _MEDIOCRE | _WORSE[name]
    drawn = {field: rng.uniform(*limits) for field, limits in ranges.items()}
    return Quality(**drawn, jpeg=int(rng.integers(22, 50)))


def _draw(image: _Image, seed: int) -> bytes:
    rng = _rng(seed, image.split, image.scene_number, 1 + image.view)
    pixels = paint.paint(image.scene, image.width, image.height, rng)
    quality = _quality(image.quality_name, rng)
    pixels = paint.spoil(pixels, quality, rng)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality.jpeg]
    _, encoded = cv2.imencode(".jpg", pixels[..., ::-1], options)
    return encoded.tobytes()


def _write_labels(draft: Path, images: dict[str, list[_Image]], seed: int) -> None:
    human, machine, boxes = [], [], []
    code = {label: label_code(label) for label in LABELS}
    spare = {label: label_code(f"not trainable {label}") for label in UNTRAINABLE}
    for image in images["train"]:
        rng = _annotator(image, seed)
        how = "verification" if rng.random() < 0.7 else "crowdsource-verification"
        verified = annotators.verified(image.scene, rng, thorough=True)
        names = [code[name] for name in verified]
        if rng.random() < 0.1:
            names.append(spare[UNTRAINABLE[int(rng.integers(len(UNTRAINABLE)))]])
        human += [(image.image_id, how, name, 1) for name in names]
        guesses = annotators.guessed(image.scene, rng)
        machine += [(image.image_id, "machine", code[n], p) for n, p in guesses]
        if rng.random() < _BOXED_IMAGES:
            drawn = annotators.boxes(image.scene, image.width, image.height)
            boxes += [
                (image.image_id, "xclick", code[name], 1, *numbers)
                for name, *numbers in drawn
            ]
    heading = ("ImageID", "Source", "LabelName", "Confidence")
    _csv(draft / "train_human_labels.csv", heading, human)
    _csv(draft / "train_machine_labels.csv", heading, machine)
    box_heading = (*heading, *annotators.BOX_COLUMNS)
    _csv(draft / "train_bounding_boxes.csv", box_heading, boxes)
    described = [(code[label], label) for label in LABELS]
    described += [(spare[label], label) for label in UNTRAINABLE]
    heading = ("label_code", "description")
    _csv(draft / "class-descriptions.csv", heading, sorted(described))
    trainable = [(name,) for name in sorted(code.values())]
    _csv(draft / "classes-trainable.csv", ("label_code",), trainable)
    _write_truth(draft, images["tuning"], images["test"], seed)
    _write_metadata(draft, images)


def _annotator(image: _Image, seed: int) -> np.random.Generator:
    """Returns the rng of an annotator; views are annotated independently."""
    return _rng(seed, image.split, image.scene_number, 3 + image.view)


def _write_truth(
    draft: Path, tuning: list[_Image], test: list[_Image], seed: int
) -> None:
    def row(image: _Image) -> tuple[str, str]:
        rng = _annotator(image, seed)
        names = annotators.verified(image.scene, rng, thorough=False)
        return image.image_id, " ".join(sorted(map(label_code, names)))

    heading = ("image_id", "labels")
    _csv(draft / "tuning_labels.csv", None, map(row, tuning))
    _csv(draft / "truth" / "solution.csv", heading, map(row, test))
    empty = [(image.image_id, "") for image in test]
    _csv(draft / "stage_1_sample_submission.csv", heading, empty)


def _write_metadata(draft: Path, images: dict[str, list[_Image]]) -> None:
    heading = ("image_id", "group", "domain", "slice")
    train = [
        (p.image_id, f"scene-{p.scene_number:06d}", p.domain, p.domain)
        for p in images["train"]
    ]
    _csv(draft / "train_meta.csv", heading, train)
    unseen = [
        (p.image_id, p.domain, f"{p.domain}/{p.quality_name}")
        for p in (*images["tuning"], *images["test"])
    ]
    heading = ("image_id", "domain", "slice")
    _csv(draft / "truth" / "test_meta.csv", heading, unseen)


def _csv(path: Path, heading: tuple[str, ...] | None, rows: Iterable[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if heading:
            writer.writerow(heading)
        writer.writerows(rows)


def prepare_toy_regions(
    directory: AnyPath, on_progress: OnProgress = no_progress
) -> None:
    """Draws and prepares the embedded dataset, unless it exists already.

    Raises:
      InputError: If the folder has other content or is in a bucket.
    """
    if (directory / INFO_FILE).exists():
        return
    if not isinstance(directory, Path):
        raise InputError(
            f"{directory} is not a local folder; toy_regions can only be drawn in a "
            "local folder"
        )
    # Several processes may need it at the same time.
    with locked(directory.parent):
        if not (directory / INFO_FILE).exists():
            _draw_and_prepare(directory, on_progress)


def _draw_and_prepare(directory: Path, on_progress: OnProgress) -> None:
    # Checked here, because drawing takes minutes.
    begun = (directory / INPUTS_FILE).exists()
    if directory.is_file() or (
        directory.is_dir() and any(directory.iterdir()) and not begun
    ):
        raise InputError(
            f"{directory} contains something other than toy_regions; use a new or "
            "empty folder, or the recipe's preset for the existing data."
        )
    drawn = directory.parent / f"{directory.name}_files"
    write(drawn, on_progress=on_progress)
    layout = kaggle.Layout.find(
        drawn,
        test_labels=drawn / "truth" / "solution.csv",
        test_metadata=drawn / "truth" / "test_meta.csv",
    )
    # No scene is in two groups or splits.
    kaggle.prepare(layout, directory, near_copies=IGNORE, on_progress=on_progress)
