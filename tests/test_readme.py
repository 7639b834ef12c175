"""Tests that every command and the Python code of the README run on little data.

The commands run in the order of the README, with overrides that make the network small
and the run short.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import small_layers

from jaxii.data.folder import FORMAT
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.prepare.toy_regions import writer

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    " ".join(shlex.split(line, comments=True))
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
SMALL = (
    "--config.model.depth=18",
    "--config.model.width=8",
    "--config.data.image_size_pixels=16",
    "--config.global_batch_size=16",
    "--config.label_embedding.dim=4",
    "--config.evaluate_every_steps=20",
    "--config.stages[0].num_epochs=2",
)


def command(line, folder):
    """Runs one line of the README in a folder."""
    # The same program with fewer blocks in its networks and on one device.
    program = f"{sys.executable} -m tests.small_main"
    words = shlex.split(line.replace("python -m jaxii.main", program, 1))
    if "train" in words or "--config" in words:
        words += SMALL
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env["JAXII_DATA_DIR"] = str(folder / "drawn")
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_is_a_page():
    assert len(TEXT.splitlines()) < 170


@pytest.mark.parametrize(
    "page",
    [path.relative_to(ROOT) for path in sorted(ROOT.rglob("README.md"))],
    ids=str,
)
def test_links_and_images_of_every_page_exist(page):
    for path in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if "://" not in path:
            assert (ROOT / page).parent.joinpath(path).exists(), path


def test_commands_are_those_of_jaxii_or_install_it():
    for line in COMMANDS:
        assert re.match(r"pip install|python -m jaxii\.main", line), line


@pytest.fixture(scope="module", autouse=True)
def few_blocks():
    with small_layers.few_blocks(1, 1, 1, 1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder: the recipes, images with a label file, and a drawn dataset."""
    root = tmp_path_factory.mktemp("reader")
    (root / "configs").symlink_to(ROOT / "configs")
    images, labels = root / "photos", ["path,labels,split"]
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(48):
        shade, tint = i % 3, i % 2
        pixels = rng.integers(0, 60, (24, 24, 3)) + 60 * shade
        pixels[..., 0] += 40 * tint
        path = images / f"{i:02d}.png"
        cv2.imwrite(str(path), pixels.astype(np.uint8))
        words = f"{('dark', 'grey', 'light')[shade]};{('warm', 'cold')[tint]}"
        labels.append(f"{path.name},{words},{'test' if i >= 36 else 'train'}")
    (root / "labels.csv").write_text("\n".join(labels) + "\n")
    shutil.copytree(images, root / "new_photos")
    shutil.copytree(images, root / "holiday")
    shutil.copy(root / "labels.csv", root / "holiday.csv")
    for name in ("a.jpg", "b.png"):
        shutil.copy(images / "00.png", root / name)
    drawn = writer.write(root / "files", num_train=60, num_tuning=10, num_test=20)
    place = root / "drawn" / f"toy_regions_v{writer.VERSION}.{FORMAT}"
    prepare(Layout.find(drawn, test_labels=drawn / "truth" / "solution.csv"), place)
    return root


@pytest.fixture(scope="module")
def read(folder):
    """Runs all commands in order; returns what each printed."""
    printed = {}
    for line in COMMANDS:
        if line.startswith("pip "):
            continue
        if " compare " in line:
            shutil.copytree(folder / "runs" / "mydata", folder / "runs" / "other")
        printed[line] = command(line, folder)
    return printed


def test_every_command_ends_well_and_leaves_its_files(read, folder):
    assert len(read) == 6
    first = folder / "runs" / "f2_multitask-toy_regions"
    for name in ("metrics.json", "submission.csv", "label_figures.csv", "report.html"):
        assert (first / name).exists()
    assert (folder / "mydata" / "mydata.py").exists()
    assert len((folder / "answers.csv").read_text().splitlines()) == 49
    assert (folder / "answers.html").exists()
    assert (folder / "exported" / "model.onnx").exists()
    assert (folder / "compare.html").exists()


def test_the_python_of_the_readme_runs(read, folder, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (folder / "small.py").write_text(
        "import runpy\n\n\ndef get_config():\n"
        "    config = runpy.run_path('mydata/mydata.py')['get_config']()\n"
        + "".join(f"    {word.removeprefix('--')}\n" for word in SMALL[:-1])
        + "    config.stages[0]['num_epochs'] = 2\n"
        + "    return config\n"
    )
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(0)
    targets = np.array([[1, 0, 0, 1, 0], [0, 1, 0, 1, 1]], np.float32)
    logits = (4 * targets - 2 + rng.normal(size=targets.shape)).astype(np.float32)
    names = {"logits": logits, "targets": targets}
    exec(block.replace("mydata/mydata.py", "small.py"), names)
    assert names["probs"].shape == (2, 5)
    assert names["probs"].dtype == np.float32
    assert names["vectors"].shape[0] == 1
    assert names["table"].num_images == 48
