"""Which images a person means, in which order; what cannot be meant is refused."""

import os

import pytest
import small_layout

from jaxii.errors import InputError
from jaxii.evaluation import listing


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with five images and other things in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "sub/c.jpeg", "sub/deeper/a,b.webp", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in ("notes.txt", "._a.jpg", ".thumbnails/t.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_a_folder_gives_its_images_at_any_depth_by_path_and_nothing_hidden(folder):
    found = listing.find(str(folder))
    assert found.names == [
        "a.png",
        "b.JPG",
        "sub/b.jpg",
        "sub/c.jpeg",
        "sub/deeper/a,b.webp",
    ]
    assert found.image_ids == ["a", "b", "b", "c", "a,b"]
    assert found.path(2) == folder / "sub/b.jpg"
    assert found.source == str(folder)


def test_a_folder_may_be_given_as_people_write_it(folder):
    assert listing.find(".").names == listing.find(f"{folder}/").names
    assert listing.find("sub/").names == ["b.jpg", "c.jpeg", "deeper/a,b.webp"]
    assert listing.find("sub/").path(0).read_bytes() == b""


def test_a_link_to_a_folder_is_followed_once_even_upwards(folder):
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "other").mkdir()
    (folder / "other" / "d.jpg").write_bytes(b"")
    (folder / "sub" / "elsewhere").symlink_to(folder / "other")
    names = listing.find("sub").names
    assert len(names) == len(set(names)) == 6
    assert "elsewhere/d.jpg" in names


def test_two_images_of_one_id_are_refused_by_name_where_ids_count(folder):
    words = r"b.JPG and sub/b.jpg share the id b; rename .* --output=FILE.jsonl"
    with pytest.raises(InputError, match=words):
        listing.find(".").check_ids()
    with pytest.raises(InputError, match=words):
        listing.find(".").select(["a"])
    listing.find("sub").check_ids()


def test_a_list_of_ids_takes_their_files_in_its_order_and_some_have_none(folder):
    found = listing.find("sub").select(["c", "gone", "b"])
    assert found.names == ["c.jpeg", "", "b.jpg"]
    assert found.image_ids == ["c", "gone", "b"]
    assert found.shown(1) == "gone (no such file)"


def test_images_keep_the_order_in_which_they_are_given(folder):
    assert listing.find("sub/c.jpeg,a.png").names == ["sub/c.jpeg", "a.png"]
    assert listing.find("sub/c.jpeg", ["b.JPG", "a.png"]).names == [
        "sub/c.jpeg",
        "b.JPG",
        "a.png",
    ]
    assert listing.find(str(folder / "a.png")).path(0) == folder / "a.png"


def test_a_comma_in_the_name_of_a_file_is_no_separator(folder):
    assert listing.find("sub/deeper/a,b.webp").names == ["sub/deeper/a,b.webp"]


def test_patterns_give_images_alone_sorted(folder):
    assert listing.find("*").names == ["a.png", "b.JPG"]
    assert listing.find("sub/**/*").names == [
        "sub/b.jpg",
        "sub/c.jpeg",
        "sub/deeper/a,b.webp",
    ]
    (folder / "x[1].jpg").write_bytes(b"")
    assert listing.find("x[1].jpg").names == ["x[1].jpg"]


@pytest.mark.parametrize("column", listing.PATH_COLUMNS)
def test_a_csv_gives_its_paths_in_its_order_from_its_own_folder(
    folder, monkeypatch, column
):
    rows = f"n,{column.upper()},image_id", '1,c.jpeg,"x, y"', f"2,{folder}/a.png,z"
    small_layout.lines(folder / "sub" / "list.csv", *rows)
    monkeypatch.chdir("/")
    found = listing.find(str(folder / "sub" / "list.csv"))
    assert found.names == ["c.jpeg", f"{folder}/a.png"]
    assert found.image_ids == ["x, y", "z"]
    assert found.path(0) == folder / "sub" / "c.jpeg"
    assert found.path(1) == folder / "a.png"


def test_a_csv_without_ids_takes_the_names_and_may_name_what_is_not_there(folder):
    path = folder / "list.csv"
    path.write_bytes("\ufeffpath\r\nno/such.jpg\r\n\r\na.png\r\n".encode())
    found = listing.find(str(path))
    assert found.names == ["no/such.jpg", "a.png"]
    assert found.image_ids == ["such", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,labels\na,\n", "has the columns id, labels; paths are taken from exactly"),
        ("image_id,labels\na,\n", "For a list of ids give --images=FOLDER --ids=CSV"),
        ("path,image\na,b\n", "has the columns path, image; .* exactly one of path,"),
        ("", "has the columns none"),
        ("path\n", "lists no image"),
        ("path,image_id\na.png,a\nb.png\n", "row 3 has no path or no id"),
        ("path,image_id\n,a\n", "row 2 has no path or no id"),
        ("path\na.png\nb.png\na.png\n", "lists a.png more than once"),
        ("path\nhttps://x.org/a.png\n", "https://x.org/a.png is an address"),
        ("path\n\xff\n", "cannot be read as CSV"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(folder, text, words):
    (folder / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        listing.find("list.csv")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("none", "--images=none is not a folder or a file"),
        ("none.csv", "--images=none.csv is not a file; give a CSV with one of"),
        ("a.png,none.png", "--images=none.png is not a folder or a file"),
        ("a.png,sub", "sub is a folder; give one folder, or images alone"),
        ("a.png,a.png", "--images lists a.png more than once"),
        ("*.gif", r"--images=\*.gif matches no image; files may end in .jpg"),
        ("empty", "empty has no image; files may end in .jpg"),
        ("https://x.org/a.png", "is an address; .* download"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, given, words):
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=words):
        listing.find(given)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_refused(folder):
    (folder / "sub").chmod(0)
    with pytest.raises(InputError, match=r"cannot be listed .Permission denied"):
        listing.find(".")
    (folder / "sub").chmod(0o755)


def test_ids_keep_the_order_of_the_sample_submission(tmp_path):
    path = small_layout.lines(tmp_path / "s.csv", "image_id,labels", "b,", "a,/m/x")
    assert listing.read_ids(path) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageId,labels\na,\n", "starts with 'ImageId,labels'; its header"),
        ("", "starts with 'nothing'"),
        ("image_id,labels\n", "lists no image"),
        ("image_id,labels\na,\nb,\na,\n", "lists a more than once"),
        ("image_id,labels\n\xff,\n", "cannot be read as CSV"),
    ],
)
def test_a_list_of_ids_that_cannot_be_used_is_refused(tmp_path, text, words):
    path = tmp_path / "ids.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        listing.read_ids(path)


def test_a_list_of_files_may_be_longer_than_a_name_can_be(folder):
    names = [f"{folder}/{'x' * 40}{i}.jpg" for i in range(20)]
    with pytest.raises(InputError, match="is not a folder or a file"):
        listing.find(",".join(names))
