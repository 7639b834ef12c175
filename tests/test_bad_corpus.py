"""Tests that bad images and tables are reported; none crashes, hangs or turns dark."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import bad_images
import bad_tables
import numpy as np
import pytest
import simplejpeg
import small_layout

from jaxii.errors import InputError
from jaxii.prepare.recode import recode
from jaxii.prepare.tables import labelled
from jaxii.prepare.tables.notes import Notes
from tests.fuzz import readers

ROOT = Path(__file__).parent.parent
SHORT_SIDE = 64
# A lossy encoding is darker than the scene by a few levels.
DARK = bad_images.DARKEST - 30


@pytest.fixture(scope="module")
def read():
    """Stored pixels and fault of each bad image; one of the two is empty."""
    return {name: stored(bad.content) for name, bad in bad_images.all_images().items()}


def stored(content):
    try:
        return simplejpeg.decode_jpeg(recode(content, short_side=SHORT_SIDE)), ""
    except ValueError as error:
        return None, str(error)


def test_there_are_200_bad_images_and_100_bad_tables():
    assert len(bad_images.all_images()) >= 200
    assert len(bad_tables.all_tables()) >= 100


def test_every_bad_image_is_read_or_has_its_fault(read):
    wrong = []
    for name, bad in bad_images.all_images().items():
        _, fault = read[name]
        assert fault.isprintable(), name
        if bad.fault == "" and fault:
            wrong.append(f"{name}: {fault}")
        elif bad.fault and not re.search(bad.fault, fault):
            wrong.append(f"{name}: {fault or 'read'} and not {bad.fault}")
    assert not wrong


def test_no_bad_image_is_dark_where_the_scene_is_bright(read):
    for name, bad in bad_images.all_images().items():
        pixels, _ = read[name]
        # Damage without a checksum may change colours, but must not lose areas.
        most = 0.5 if bad.fault is None else 0.0
        assert pixels is None or (pixels.max(axis=-1) < DARK).mean() <= most, name


def test_what_has_to_be_read_shows_the_scene(read):
    scene = np.asarray(bad_images.scene()).astype(int)
    for name, bad in bad_images.all_images().items():
        pixels, _ = read[name]
        if bad.fault == "" and pixels.shape == scene.shape:
            assert np.abs(pixels.astype(int) - scene).mean() < 6, name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "photos"
    folder.mkdir()
    for i, name in enumerate(bad_tables.NAMES):
        small_layout.put(folder, Path(name).stem, small_layout.jpeg(90 + i))
    return folder


@pytest.mark.parametrize("name", bad_tables.all_tables())
def test_a_bad_table_is_read_right_or_refused(photos, name):
    table, notes = bad_tables.all_tables()[name], Notes()
    path = photos.parent / name
    path.write_bytes(table.content)
    try:
        found = labelled.read(photos, path, notes)
    except InputError as error:
        assert table.refused != "", error
        assert re.search(table.refused or "", str(error))
        return
    assert not table.refused
    said = "\n".join(notes.lines)
    assert re.search(table.said, said)
    if table.refused == "":
        pairs = zip(found.files, found.entries, strict=True)
        got = {Path(f).name: [found.labels[i] for i in e] for f, e in pairs}
        assert got == {n: [label] for n, label in bad_tables.TRUTH.items()}


@pytest.mark.parametrize("kind", ["images", "tables"])
def test_what_fuzzing_reached_is_read_or_refused(kind):
    read = {"images": readers.image, "tables": readers.table}[kind]
    seeds = list((ROOT / "tests" / "fuzz" / "seeds" / kind).iterdir())
    assert seeds
    for path in seeds:
        read(path.read_bytes())


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Results of each command on the whole corpus, run in its own process."""
    folder = tmp_path_factory.mktemp("corpus")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_corpus", folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_no_command_on_a_bad_file_crashes_hangs_or_takes_much_memory(ended):
    _, report = ended
    for command in report:
        told = f"{command['name']}: {command['stderr'][-2000:]}"
        assert command["code"] in (0, 2), told
        assert "Traceback" not in command["stderr"], told
        assert command["peak_bytes"] < 2_000_000_000, told
        if command["code"] == 2:
            last = command["stderr"].splitlines()[-1]
            assert last.startswith("jaxii: "), told


@pytest.mark.slow
def test_all_bad_images_are_counted_and_named(ended):
    folder, report = ended
    said = {command["name"]: command for command in report}
    assert all(said[name]["code"] == 0 for name in ("new", "prepare", "train")), said
    lines = (folder / "images" / "all.jsonl").read_text().splitlines()
    answers = {(row := json.loads(line))["file"]: row for line in lines}
    for name, bad in bad_images.all_images().items():
        if bad.fault is not None:
            assert bool(answers[name].get("error")) == bool(bad.fault), name
    damaged = sum("error" in answer for answer in answers.values())
    assert (
        f"{len(answers)} images, {damaged} of them damaged" in said["predict"]["stdout"]
    )
    # `new` does not list names that are not UTF-8.
    assert f"{damaged:,} broken images" in said["new"]["stdout"]
    unreadable = re.search(r"train: .*; (\d+) unreadable", said["prepare"]["stdout"])
    assert unreadable is not None
