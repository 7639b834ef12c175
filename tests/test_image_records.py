"""Images on disk are seen as prepared ones are, and damaged ones say why not."""

import io
import os
from pathlib import Path

import cv2
import mixed_images
import numpy as np
import pytest
import simplejpeg
import small_layout
from PIL import Image

from jaxii.data.dataset import open_dataset
from jaxii.data.transforms import EvalTransform
from jaxii.evaluation import listing
from jaxii.evaluation.image_records import THUMBNAIL_PIXELS, ImageFiles
from jaxii.prepare import recode
from jaxii.prepare.kaggle import Layout, prepare


def scene(width=400, height=300):
    """Returns an image whose corners differ: red, green, blue and grey."""
    corners = np.uint8([[[230, 30, 30], [30, 200, 30]], [[30, 30, 230], [128] * 3]])
    pixels = cv2.resize(corners, (width, height), interpolation=cv2.INTER_NEAREST)
    return Image.fromarray(pixels)


def files_of(folder, short_side=256):
    return ImageFiles(listing.find(str(folder)), short_side)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    number = len(mixed_images.WHOLE) + len(mixed_images.DAMAGED)
    damaged = len(mixed_images.DAMAGED)
    written = mixed_images.write(folder, [scene()], number, damaged)
    return files_of(folder), {one.name: one for one in written}


def test_every_encoding_is_seen_upright_and_in_its_colours(mixed):
    files, written = mixed
    view = EvalTransform(size_pixels=16)
    plain = np.asarray(scene().crop((50, 0, 350, 300)).resize((16, 16)))
    seen = set()
    for row, name in enumerate(files.listing.names):
        kind = written[name].kind
        if kind not in mixed_images.WHOLE:
            continue
        seen.add(kind)
        pixels = view(files[row]["image"])
        inner = [pixels[3, 3], pixels[3, 12], pixels[12, 3], pixels[12, 12]]
        want = [plain[3, 3], plain[3, 12], plain[12, 3], plain[12, 12]]
        if not mixed_images.WHOLE[kind][2]:
            weights = np.repeat([[0.299], [0.587], [0.114]], 3, axis=1)
            want = np.float32(want) @ weights
        np.testing.assert_allclose(np.int32(inner), want, atol=9, err_msg=kind)
    assert seen == set(mixed_images.WHOLE)


@pytest.mark.parametrize("kind", mixed_images.WHOLE)
def test_a_stored_file_is_seen_as_the_same_file_is_when_it_is_predicted(tmp_path, kind):
    suffix, encode, _ = mixed_images.WHOLE[kind]
    stored = encode(scene())
    (tmp_path / f"a{suffix}").write_bytes(stored)
    # `open_images_v4` stores files as they are, and `predict` then reduces none.
    recoded = files_of(tmp_path, short_side=recode.MAX_PIXELS)[0]["image"]
    for size in (300, 70, 16):
        view = EvalTransform(size_pixels=size)
        difference = np.abs(view(stored).astype(float) - view(recoded))
        # Other formats become JPEG, which is then decoded at a smaller scale.
        assert difference.mean() < (1.5 if kind.startswith("JPEG") else 5)


def test_damaged_files_raise_and_say_why_and_no_others(mixed):
    files, written = mixed
    reasons = {}
    for row, name in enumerate(files.listing.names):
        if written[name].is_damaged:
            with pytest.raises(ValueError, match=r"\w"):
                files[row]
            reasons[written[name].kind] = files.fault(row)
        else:
            assert files.fault(row).startswith("could not be read at first")
    assert set(reasons) == set(mixed_images.DAMAGED)
    assert "truncated JPEG" in reasons["JPEG cut"]
    assert "truncated" in reasons["PNG cut"] and "truncated" in reasons["WebP cut"]
    assert "empty file" in reasons["empty"]
    assert "GIF" in reasons["GIF"]
    assert "HTML" in reasons["HTML"]
    assert "0x0 pixels" in reasons["no pixels"]


def test_a_file_is_read_as_prepare_stores_it(tmp_path):
    root = small_layout.write(tmp_path / "files")
    big = mixed_images.turned(scene(700, 500), 6, "JPEG", quality=90)
    (root / "stage_1_test_images" / "test1.jpg").write_bytes(big)
    prepare(Layout.find(root), tmp_path / "data")
    records = open_dataset(tmp_path / "data").splits["test"].source
    files = files_of(root / "stage_1_test_images")
    ours = dict(zip(files.listing.image_ids, range(len(files)), strict=True))
    assert len(records) == 3
    for row in range(3):
        record = records[row]
        assert files[ours[record["image_id"]]]["image"] == record["image"]


def test_what_the_disk_says_of_a_file_is_its_fault(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "file.jpg").write_bytes(b"")
    names = ["folder.jpg", "gone.jpg", "loop.jpg", "file.jpg/x.jpg", f"{'x' * 300}.jpg"]
    path = small_layout.lines(tmp_path / "list.csv", "path", *names)
    files = files_of(path)
    assert [files.fault(row) for row in range(len(files))] == [
        "a folder",
        "no such file",
        "a link to itself",
        "no such file",
        "a name too long for a file",
    ]
    absent = ImageFiles(files.listing.select(["no id"]), 256)
    assert absent.fault(0) == "no file of this id"


def test_a_disk_that_fails_is_not_the_fault_of_a_image(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"")

    def fail(path):
        raise OSError(5, "Input/output error")

    files = files_of(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        files[0]


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(name, "wb") as file:  # noqa: PTH123 (a name of bytes)
        file.write(small_layout.jpeg(100))
    files = files_of(tmp_path)
    assert files.listing.names == ["\udcff.jpg"]
    assert files[0]["image"]


def test_a_thumbnail_is_the_central_square_and_never_enlarged(tmp_path):
    scene(600, 300).save(tmp_path / "a.png")
    scene(40, 30).save(tmp_path / "b.png")
    files = files_of(tmp_path)
    sizes = [Image.open(io.BytesIO(files.thumbnail(row))).size for row in (0, 1)]
    assert sizes == [(THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), (30, 30)]
    pixels = simplejpeg.decode_jpeg(files.thumbnail(0))
    np.testing.assert_allclose(pixels[60, 60], [230, 30, 30], atol=12)
    with pytest.raises(ValueError, match="empty"):
        (tmp_path / "c.png").write_bytes(b"")
        files_of(tmp_path).thumbnail(2)
