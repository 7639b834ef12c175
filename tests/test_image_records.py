"""Tests that images on disk are found in order, read as prepared; faults are named."""

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
from jaxii.errors import InputError
from jaxii.evaluation import image_records
from jaxii.evaluation.image_records import (
    THUMBNAIL_PIXELS,
    ImageFiles,
    thumbnails,
)
from jaxii.prepare import recode
from jaxii.prepare.kaggle import Layout, prepare
from jaxii.runs.predict import Request


def scene(width=400, height=300):
    """Returns an image whose corners differ: red, green, blue and grey."""
    corners = np.uint8([[[230, 30, 30], [30, 200, 30]], [[30, 30, 230], [128] * 3]])
    pixels = cv2.resize(corners, (width, height), interpolation=cv2.INTER_NEAREST)
    return Image.fromarray(pixels)


def files_of(folder, short_side=256):
    return ImageFiles(image_records.find(str(folder)), short_side)


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
    plain = np.asarray(scene().resize((16, 16)))
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
    # At 1/8, a JPEG decodes whole blocks; a partial block would move with its rotation.
    stored = encode(scene(400, 304))
    (tmp_path / f"a{suffix}").write_bytes(stored)
    # `open_images_v4` stores files unchanged, and `predict` then reduces no image.
    recoded = files_of(tmp_path, short_side=recode.MAX_PIXELS)[0]["image"]
    for size in (300, 70, 16):
        view = EvalTransform(size_pixels=size)
        difference = np.abs(view(stored).astype(float) - view(recoded))
        # Other formats become JPEGs, which are then decoded at a smaller scale.
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
    assert absent.fault(0) == "no file with this id"


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


def test_a_thumbnail_is_the_whole_image_and_never_enlarged(tmp_path):
    scene(600, 300).save(tmp_path / "a.png")
    scene(40, 30).save(tmp_path / "b.png")
    files = files_of(tmp_path)
    sizes = [Image.open(io.BytesIO(thumbnails(files)(row))).size for row in (0, 1)]
    assert sizes == [(THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 2), (40, 30)]
    pixels = simplejpeg.decode_jpeg(thumbnails(files)(0))
    np.testing.assert_allclose(pixels[30, 60], [230, 30, 30], atol=12)
    with pytest.raises(ValueError, match="empty"):
        (tmp_path / "c.png").write_bytes(b"")
        thumbnails(files_of(tmp_path))(2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with five images and other entries."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "sub/deeper/a,b.webp", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("notes.txt", "._a.jpg", ".thumbnails/t.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_gives_its_images_at_any_depth_by_path_and_nothing_hidden(folder):
    found = image_records.find(str(folder))
    assert found.names == [
        "a.png",
        "b.JPG",
        "sub/b.jpg",
        "sub/c.jpeg",
        "sub/deeper/a,b.webp",
    ]
    # Two files are called b, so ids are paths.
    assert found.image_ids == ["a", "b", "sub/b", "sub/c", "sub/deeper/a,b"]
    assert image_records.find("sub").image_ids == ["b", "c", "a,b"]
    assert found.path(2) == folder / "sub/b.jpg"
    assert found.source == str(folder)


def test_a_folder_that_macos_adds_to_archives_is_hidden(folder):
    (folder / "__MACOSX" / "sub").mkdir(parents=True)
    (folder / "__MACOSX" / "sub" / "c.jpeg").write_bytes(b"")
    assert len(image_records.find(".")) == 5
    assert len(image_records.find("__MACOSX")) == 1


def test_a_folder_may_be_given_as_people_write_it(folder):
    assert image_records.find(".").names == image_records.find(f"{folder}/").names
    assert image_records.find("sub/").names == ["b.jpg", "c.jpeg", "deeper/a,b.webp"]
    assert image_records.find("sub/").path(0).read_bytes() == b""


def test_a_link_to_a_folder_is_followed_once_even_upwards(folder):
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "other").mkdir()
    (folder / "other" / "d.jpg").write_bytes(b"")
    (folder / "sub" / "elsewhere").symlink_to(folder / "other")
    names = image_records.find("sub").names
    assert len(names) == len(set(names)) == 6
    assert "elsewhere/d.jpg" in names


def test_two_images_of_one_id_are_refused_by_name_where_ids_count(folder):
    words = r"b.JPG and sub/b.jpg share the id b; rename .* --output=FILE.jsonl"
    given = "a.png,b.JPG,sub/b.jpg"
    with pytest.raises(InputError, match=words):
        image_records.find(given).check_ids()
    with pytest.raises(InputError, match=words):
        image_records.find(given).select(["a"])
    image_records.find("sub").check_ids()


def test_a_submission_refuses_two_images_of_one_id_and_json_lines_do_not(folder):
    given = "a.png,b.JPG,sub/b.jpg"
    with pytest.raises(InputError, match="share the id b"):
        Request(images=given, output=folder / "answers.csv").find()
    assert len(Request(images=given, output=folder / "answers.jsonl").find().names) == 3
    assert len(Request(images=given).find().names) == 3


def test_a_submission_of_a_folder_takes_files_of_one_name(folder):
    found = Request(images=".", output=folder / "answers.csv").find()
    assert found.image_ids[1:3] == ["b", "sub/b"]
    chosen = found.select(["sub/b.jpg", "gone", "b"])
    assert chosen.names == ["sub/b.jpg", "", "b.JPG"]


@pytest.mark.parametrize("asked", ["c", "c.jpeg"])
def test_an_id_may_be_a_file_name_where_ids_are_paths(folder, asked):
    found = image_records.find(".").select(["a", asked, "gone"])
    assert found.names == ["a.png", "sub/c.jpeg", ""]
    assert found.image_ids == ["a", asked, "gone"]


@pytest.mark.parametrize("asked", ["b", "b.jpg"])
def test_of_identical_files_of_one_name_the_first_is_taken(folder, asked):
    (folder / "a").mkdir()
    (folder / "a" / "b.jpg").write_bytes(b"")
    assert image_records.find(".").select([asked]).names == ["a/b.jpg"]
    (folder / "sub" / "b.jpg").write_bytes(b"other")
    words = f"--ids lists {asked}, but a/b.jpg and sub/b.jpg are different .* as a/b"
    with pytest.raises(InputError, match=words):
        image_records.find(".").select([asked])


def test_a_list_of_paths_means_these_files_even_if_they_share_a_name(folder):
    (folder / "sub" / "b.jpg").write_bytes(b"other")
    found = image_records.find(".")
    assert found.select(["sub/b", "b"]).names == ["sub/b.jpg", "b.JPG"]


def test_a_submission_says_that_its_ids_are_paths(folder, capsys):
    for images, is_said in ((".", True), ("sub", False)):
        Request(images=images, output=folder / "answers.csv").find()
        said = capsys.readouterr().out
        assert ("CAVEAT     the image id is the path below --images" in said) == is_said


def test_a_list_of_ids_takes_their_files_in_its_order_and_some_have_none(folder):
    found = image_records.find("sub").select(["c", "gone", "b"])
    assert found.names == ["c.jpeg", "", "b.jpg"]
    assert found.image_ids == ["c", "gone", "b"]
    assert found.shown(1) == "gone (no such file)"


def test_images_keep_the_order_in_which_they_are_given(folder):
    assert image_records.find("sub/c.jpeg,a.png").names == ["sub/c.jpeg", "a.png"]
    assert image_records.find("sub/c.jpeg", ["b.JPG", "a.png"]).names == [
        "sub/c.jpeg",
        "b.JPG",
        "a.png",
    ]
    assert image_records.find(str(folder / "a.png")).path(0) == folder / "a.png"


def test_a_comma_in_the_name_of_a_file_is_no_separator(folder):
    assert image_records.find("sub/deeper/a,b.webp").names == ["sub/deeper/a,b.webp"]


def test_patterns_give_images_alone_sorted(folder):
    assert image_records.find("*").names == ["a.png", "b.JPG"]
    assert image_records.find("sub/**/*").names == [
        "sub/b.jpg",
        "sub/c.jpeg",
        "sub/deeper/a,b.webp",
    ]
    (folder / "x[1].jpg").write_bytes(b"")
    assert image_records.find("x[1].jpg").names == ["x[1].jpg"]


@pytest.mark.parametrize("column", image_records.PATH_COLUMNS)
def test_a_csv_gives_its_paths_in_its_order_from_its_own_folder(
    folder, monkeypatch, column
):
    rows = f"n,{column.upper()},image_id", '1,c.jpeg,"x, y"', f"2,{folder}/a.png,z"
    small_layout.lines(folder / "sub" / "list.csv", *rows)
    monkeypatch.chdir("/")
    found = image_records.find(str(folder / "sub" / "list.csv"))
    assert found.names == ["c.jpeg", f"{folder}/a.png"]
    assert found.image_ids == ["x, y", "z"]
    assert found.path(0) == folder / "sub" / "c.jpeg"
    assert found.path(1) == folder / "a.png"


def test_a_csv_without_ids_takes_the_names_and_may_name_what_is_not_there(folder):
    path = folder / "list.csv"
    path.write_bytes("\ufeffpath\r\nno/such.jpg\r\n\r\na.png\r\n".encode())
    found = image_records.find(str(path))
    assert found.names == ["no/such.jpg", "a.png"]
    assert found.image_ids == ["such", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "n;path;image_id\r\n1;sub/c.jpeg;x\r\n2;a.png;y\r\n",
        "sep=\t\r\npath\timage_id\r\nsub/c.jpeg\tx\r\na.png\ty\r\n",
        "path,image_id,,\r\nsub/c.jpeg,x,,\r\n,,,\r\na.png,y,,\r\n , \r\n",
    ],
)
def test_a_csv_is_read_as_spreadsheets_save_it(folder, text):
    (folder / "list.csv").write_bytes(f"\ufeff{text}".encode())
    found = image_records.find("list.csv")
    assert found.names == ["sub/c.jpeg", "a.png"]
    assert found.image_ids == ["x", "y"]


def test_a_list_of_ids_is_read_as_spreadsheets_save_it(tmp_path):
    path = small_layout.lines(tmp_path / "s.csv", "sep=;", "image_id;labels", "b;x y")
    with path.open("a") as file:
        file.write("a;\n;\n")
    assert image_records.read_ids(path) == ["b", "a"]


def test_a_listed_path_is_found_as_another_system_writes_it(folder):
    (folder / "e\u0301te\u0301").mkdir()
    disk = ["e\u0301te\u0301/cafe\u0301.jpg", "sub/b.jpg", r"x\y.jpg"]
    for name in (disk[0], disk[2]):
        (folder / name).write_bytes(b"")
    listed = ["\u00e9t\u00e9/caf\u00e9.jpg", r"sub\b.jpg", r"x\y.jpg", r"sub\no.jpg"]
    small_layout.lines(folder / "list.csv", "path", *listed)
    found = image_records.find("list.csv")
    assert found.names == [*disk, r"sub\no.jpg"]
    absolute = [f"{folder}/{name}" for name in listed[:2]]
    small_layout.lines(folder / "list.csv", "path", *absolute)
    assert image_records.find("list.csv").names == [f"{folder}/{n}" for n in disk[:2]]


def test_a_listed_path_that_fits_two_files_is_kept_as_it_is(folder):
    # The files have the Angstrom sign and its parts; the list has the letter.
    for name in ("\u212b.jpg", "A\u030a.jpg"):
        (folder / name).write_bytes(b"")
    small_layout.lines(folder / "list.csv", "path", "\u00c5.jpg")
    assert image_records.find("list.csv").names == ["\u00c5.jpg"]


def test_an_id_is_found_however_its_letters_are_stored(folder):
    (folder / "sub" / "e\u0301.jpg").write_bytes(b"")
    listing = image_records.find("sub")
    found = listing.select(["\u00e9.jpg", "\u00e9", "b"])
    assert found.names == ["e\u0301.jpg", "e\u0301.jpg", "b.jpg"]
    assert found.image_ids == ["\u00e9.jpg", "\u00e9", "b"]
    (folder / "sub" / "\u00e9.jpg").write_bytes(b"")
    both = image_records.find("sub").select(["\u00e9", "e\u0301", "\u00e9.jpg"])
    assert both.names == ["\u00e9.jpg", "e\u0301.jpg", "\u00e9.jpg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,labels\na,\n", "has the columns id, labels; it needs exactly one of"),
        ("image_id,labels\na,\n", "For a list of ids, use --images=FOLDER --ids=CSV"),
        ("path,image\na,b\n", "has the columns path, image; .* exactly one of path,"),
        ("", "has the columns none"),
        ("path\n", "lists no images"),
        ("path,image_id\na.png,a\nb.png\n", "row 3 lacks a path or an id"),
        ("path,image_id\n,a\n", "row 2 lacks a path or an id"),
        ("path,n\na.png,1\n,2\n", "row 3 lacks a path; give one"),
        ("path\na.png\nb.png\na.png\n", "lists a.png more than once"),
        ("path\nhttps://x.org/a.png\n", "https://x.org/a.png is a URL"),
        ("path\n\xff\n", "cannot be read as CSV"),
        ('path\n"a.png\nb.png\n', "cannot be read as CSV .unexpected end of data"),
        ('path,n\n"a.png,1\nb.png,"2"\n', "cannot be read as CSV .',' expected"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(folder, text, words):
    (folder / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        image_records.find("list.csv")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("none", "--images=none is not a file or a folder"),
        ("none.csv", "--images=none.csv is not a file; give a CSV with one of"),
        ("a.png,none.png", "--images=none.png is not a file or a folder"),
        ("a.png,sub", "sub is a folder; give one folder, or only images"),
        ("a.png,a.png", "--images lists a.png more than once"),
        (
            "*.gif",
            r"--images=\*.gif matches no images; supported file endings are .jpg",
        ),
        ("empty", "empty contains no images; supported file endings are .jpg"),
        ("https://x.org/a.png", "is a URL; .* download"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, given, words):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        image_records.find(given)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(folder):
    (folder / "sub").chmod(0)
    with pytest.raises(InputError, match=r"cannot be listed .Permission denied"):
        image_records.find(".")
    (folder / "sub").chmod(0o755)


def test_ids_keep_the_order_of_the_sample_submission(tmp_path):
    path = small_layout.lines(tmp_path / "s.csv", "image_id,labels", "b,", "a,/m/x")
    assert image_records.read_ids(path) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageId,labels\na,\n", "starts with 'ImageId,labels'; its header"),
        ("", "starts with 'nothing'"),
        ("image_id,labels\n", "lists no images"),
        ("image_id,labels\na,\nb,\na,\n", "lists a more than once"),
        ("image_id,labels\n\xff,\n", "cannot be read as CSV"),
        ('image_id,labels\n"a,\nb,\n', "cannot be read as CSV .unexpected end"),
    ],
)
def test_a_list_of_ids_that_cannot_be_used_is_refused(tmp_path, text, words):
    path = tmp_path / "ids.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        image_records.read_ids(path)


def test_a_list_of_files_may_be_longer_than_a_name_can_be(folder):
    names = [f"{folder}/{'x' * 40}{i}.jpg" for i in range(20)]
    with pytest.raises(InputError, match="is not a file or a folder"):
        image_records.find(",".join(names))
