"""Copies for `damage`: of a dataset, of a run, and of a run stopped half-way.

All are as small as possible and have every kind of file: human and machine labels,
metadata, tuning and test labels, a label embedding that is dropped, and more than one
checkpoint per stage.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests import forked

BUILDING_SECONDS = 600
DONE, MISUSED, PREEMPTED = 0, 2, 75

DATA, RUN, STOPPED = "prepared_data", "trained_run", "stopped_run"
OTHER, IMAGES, RECIPE = "other_run", "images", "recipe.py"
WORKDIR = f"--workdir={RUN}"
TRAIN = ("train", f"--config={RECIPE}", f"--data_dir={DATA}", WORKDIR)
# In the folder of a case, a run to resume has the name of the trained run.
COMMANDS = {
    "train": TRAIN,
    "resume": TRAIN,
    "evaluate": ("evaluate", WORKDIR),
    "predict": ("predict", WORKDIR, f"--images={IMAGES}", "--output=answers.jsonl"),
    "export": ("export", WORKDIR, "--output=exported"),
    "compare": ("compare", RUN, OTHER, "--markdown"),
}
COMMANDS_OF = {
    DATA: tuple(COMMANDS),
    RUN: tuple(name for name in COMMANDS if name != "resume"),
    STOPPED: ("resume",),
}
UNDAMAGED = "none"
DAMAGES = ("deleted", "emptied", "truncated", "flipped", "replaced")
# Only on request: people may do this, but file systems do not.
ALTERED = "altered"
LABEL_LISTS = ("labels.csv", "label_ids.labels.txt", "label_sources.labels.txt")
FLIPPED_BYTES = 64
# Names of files that Orbax stores.
RANDOM = "[0-9a-f]{32}"
# The first maps digits to digits, the second to letters; both keep ASCII.
PATTERN = (0x01, 0x5A)


RECIPE_TEXT = """
from jaxii.config import default_config

def get_config(name=""):
    config = default_config()
    config.data.dataset = "kaggle"
    config.data.image_size_pixels = 32
    config.data.validation_fraction = 0.3
    config.data.machine_labels = "soft"
    config.data.augmentation = 0.0
    config.data.num_threads = 1
    config.model.depth = 18
    config.model.width = 8
    config.model.stem = "small"
    config.model.compute_dtype = "float32"
    config.global_batch_size = 8
    config.label_embedding.dim = 8
    config.optimizer.average = "ema"
    config.optimizer.ema_decay = 0.5
    config.evaluate_every_steps = 2
    config.evaluate_train_images = 8
    config.log_every_steps = 1
    config.stages = (
        {
            "name": "multitask",
            "num_steps": 4,
            "embedding_head": True,
            "terms": {"bce": 1.0, "embedding": 1.0},
        },
        {"name": "classifier", "num_steps": 4, "terms": {"bce": 1.0, "soft_f": 1.0}},
    )
    return config
"""
STOPPED_AFTER_STEP = 6


@dataclass(frozen=True)
class Case:
    """One damage to one file, and the command that is run on it.

    Attributes:
      root: `DATA`, `RUN` or `STOPPED`.
      file: Path below it; "" for an undamaged copy.
      damage: One of `DAMAGES`, or `UNDAMAGED`.
      command: One of `COMMANDS`.
    """

    root: str
    file: str
    damage: str
    command: str

    @property
    def place(self) -> str:
        """Path of the damaged file in the folder of the case."""
        return f"{RUN if self.root == STOPPED else self.root}/{self.file}"

    @property
    def name(self) -> str:
        """Description of the case."""
        if not self.file:
            return f"undamaged, {self.command}"
        return f"{self.root}/{self.file} {self.damage}, {self.command}"

    @property
    def named_at_random(self) -> bool:
        """Whether the file has another name in each run."""
        return re.fullmatch(RANDOM, Path(self.file).name) is not None

    @property
    def kind(self) -> str:
        """Path of the file without the parts that differ within its kind."""
        return f"{self.root}/{kind_of(self.file)}" if self.file else "undamaged"


def damage_bytes(content: bytes, damage: str, like: bytes | None) -> bytes | None:
    """Returns the content of a file after damage; None for no file.

    Args:
      content: Content of the file.
      damage: One of `DAMAGES`, or `ALTERED`, which changes the digit nearest to the
        middle of a text.
      like: The content that replaces it.
    """
    match damage:
        case "deleted":
            return None
        case "emptied":
            return b""
        case "truncated":
            return content[: len(content) // 2]
        case "flipped":
            changed = bytearray(content)
            count = min(FLIPPED_BYTES, len(content))
            for i in range(count):
                # In the middle of each part: a first byte identifies many formats.
                place = (2 * i + 1) * len(content) // (2 * count)
                changed[place] ^= PATTERN[i % len(PATTERN)]
            return bytes(changed)
        case "altered":
            return _other_digit(content)
        case _:
            return like


def _other_digit(content: bytes) -> bytes:
    middle = len(content) // 2
    digits = [found.start() for found in re.finditer(rb"[0-9]", content)]
    if b"\0" in content or not digits:
        return content
    changed = bytearray(content)
    changed[min(digits, key=lambda place: abs(place - middle))] ^= 1
    return bytes(changed)


def kind_of(file: str) -> str:
    """Returns a path without the parts that differ within a kind of file."""
    file = re.sub(rf"\b{RANDOM}\b", "*", file)
    file = re.sub(r"^checkpoints/\w+/\d+/", "checkpoints/*/*/", file)
    file = re.sub(r"events\.\d+\.out\..*", "events.*", file)
    return re.sub(r"-(train|validation|tuning|test)\b", "-*", file)


def files_of(root: Path) -> list[str]:
    """Returns the files below a folder, relative to it."""
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(path.relative_to(root).as_posix() for path in found)


def like_of(root: Path, file: str, other: Path) -> bytes | None:
    """Returns the counterpart of a file in another folder; None if there is none.

    The counterpart has the same path. For a file with a random name, it is the file
    with the same rank by size in the same folder, or in a folder of the same kind. The
    labels are the same in both, so lists of labels are put into another order.
    """
    if Path(file).name in LABEL_LISTS:
        head = file.endswith(".csv")
        lines = (root / file).read_bytes().splitlines(keepends=True)
        return b"".join(lines[:head] + lines[head:][::-1])
    if (other / file).is_file():
        return (other / file).read_bytes()
    kind, folder = kind_of(file), Path(file).parent

    def ranked(of: Path) -> list[str]:
        likes = [name for name in files_of(of) if kind_of(name) == kind]
        near = [name for name in likes if Path(name).parent == folder]
        return sorted(near or likes, key=lambda name: (of / name).stat().st_size)

    others = ranked(other)
    if not others:
        return None
    rank = ranked(root).index(file)
    return (other / others[min(rank, len(others) - 1)]).read_bytes()


class Built:
    """Two datasets of the same sizes, each with a trained and a stopped run.

    Args:
      folder: Contains `one` and `other`.
      extra: Additional words for every command.
    """

    def __init__(self, folder: Path, extra: Sequence[str]):
        self.one, self.other = folder / "one", folder / "other"
        self._cases = folder / "cases"
        self._extra = extra
        self._count = 0
        self._likes: dict[tuple[str, str], bytes | None] = {}

    def build(self, *, at_once: int, stopped: bool) -> None:
        """Draws, prepares and trains; `stopped` adds the run to resume."""
        shutil.rmtree(self._cases, ignore_errors=True)
        for folder in (self.one, self.other):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / RECIPE).write_text(RECIPE_TEXT)
        steps: list[Callable[[int], Callable[[], int]]] = [
            lambda seed: partial(_prepare, seed),
            lambda seed: forked.command(*TRAIN, f"--config.seed={seed}"),
        ]
        if stopped:
            steps.append(lambda seed: partial(_train_half, seed))
        for step in steps:
            jobs = [
                (seed, step(seed), lambda folder=folder: folder)
                for seed, folder in enumerate((self.one, self.other))
            ]
            ends = forked.run_all(jobs, at_once=at_once, most_seconds=BUILDING_SECONDS)
            for _, folder, ended in ends:
                if ended.code not in (DONE, PREEMPTED):
                    said = forked.said(folder)
                    raise SystemExit(f"building ends with code {ended.code}:\n{said}")

    def cases(self, damages: Sequence[str]) -> list[Case]:
        """Returns every case with these kinds of damage, those of the dataset first."""
        found = []
        for root, commands in COMMANDS_OF.items():
            if not (self.one / root).exists():
                continue
            for file in files_of(self.one / root):
                content = (self.one / root / file).read_bytes()
                for damage in damages:
                    left = damage_bytes(content, damage, self._like(root, file))
                    # Skips damage that changes nothing, and files without a
                    # counterpart.
                    if left == content or (left is None and damage != "deleted"):
                        continue
                    found += [Case(root, file, damage, name) for name in commands]
        return found

    def make_folder(self, case: Case) -> Path:
        """Returns a fresh copy of everything, damaged as in the case."""
        self._count += 1
        folder = self._cases / f"{self._count:06d}"
        run = STOPPED if case.command == "resume" else RUN
        shutil.copytree(self.one / DATA, folder / DATA)
        shutil.copytree(self.one / run, folder / RUN)
        (folder / OTHER).symlink_to(self.other / RUN)
        for name in (IMAGES, RECIPE):
            (folder / name).symlink_to(self.one / name)
        if case.file:
            left = self.damaged(case)
            path = folder / case.place
            path.unlink()
            if left is not None:
                path.write_bytes(left)
        return folder

    def damaged(self, case: Case) -> bytes | None:
        """Returns the content of a case's file after the damage; None for no file."""
        content = (self.one / case.root / case.file).read_bytes()
        return damage_bytes(content, case.damage, self._like(case.root, case.file))

    def act(self, case: Case) -> Callable[[], int]:
        """Returns the command of a case as a call."""
        call = forked.command(*COMMANDS[case.command], *self._extra)
        return partial(_export, call, self.one) if case.command == "export" else call

    def _like(self, root: str, file: str) -> bytes | None:
        if (root, file) not in self._likes:
            like = like_of(self.one / root, file, self.other / root)
            self._likes[root, file] = like
        return self._likes[root, file]


def _prepare(seed: int) -> int:
    """Draws a small challenge with every kind of file, and prepares it."""
    from jaxii.prepare.toy_regions import writer

    drawn = writer.write(
        Path("files"), seed=seed, num_train=40, num_tuning=8, num_test=12
    )
    test = sorted((drawn / "stage_1_test_images").iterdir())
    Path(IMAGES).mkdir()
    for path in test[:6]:
        shutil.copy(path, IMAGES)
    truth = drawn / "truth"
    return forked.command(
        "prepare",
        f"--input_dir={drawn}",
        f"--data_dir={DATA}",
        "--short_side=48",
        f"--test_labels={truth / 'solution.csv'}",
        f"--test_metadata={truth / 'test_meta.csv'}",
    )()


def _train_half(seed: int) -> int:
    from jaxii.distributed import processes

    processes.preemption_notice = lambda: lambda step: step >= STOPPED_AFTER_STEP
    words = [word for word in TRAIN if word != WORKDIR]
    return forked.command(*words, f"--workdir={STOPPED}", f"--config.seed={seed}")()


def _export(call: Callable[[], int], reference: Path) -> int:
    """Exports, and applies the program unless it equals that of the undamaged run."""
    code = call()
    if code != DONE:
        return code
    program, answers = Path("exported/model.stablehlo"), "probabilities.npy"
    known = reference / answers
    before = (reference / program.name).read_bytes() if known.exists() else b""
    if program.read_bytes() == before:
        shutil.copy(known, program.parent)
        return code
    import numpy as np

    from jaxii.export.programs import read_stablehlo

    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.save(program.parent / answers, read_stablehlo(program)(images))
    if not known.exists():
        shutil.copy(program, reference)
        shutil.copy(program.parent / answers, known)
    return code
