"""Tests `new`: from plain data to printed assumptions and a recipe that trains."""

import csv
import io
import json
import re
import runpy
import shlex
import shutil
import unicodedata
from dataclasses import replace

import cv2
import numpy as np
import plain_data
import polars as pl
import pytest
import small_layout

from jaxii.cli.dispatch import parse
from jaxii.config import Config, default_config, differences
from jaxii.data.dataset import open_dataset
from jaxii.data.labels import Vocabulary
from jaxii.data.prepared import open_prepared
from jaxii.errors import InputError
from jaxii.evaluation.predictions import write_submission
from jaxii.prepare import label_files, shards
from jaxii.prepare import recipe as recipes
from jaxii.prepare.new import new
from jaxii.prepare.tables import images, labelled, rows
from jaxii.prepare.tables.images import NOWHERE, Matcher
from jaxii.prepare.tables.notes import Notes, shown
from jaxii.prepare.tables.table import read_table
from jaxii.storage import LOCK

LABELS = (
    ["Dog", "Grass"],
    ["Cat"],
    ["Dog"],
    ["Boat", "Water", "Sky"],
    ["Grass", "Sky"],
    ["Boat", "Sky"],
    ["Water", "Dog"],
)
OPTIONS = {
    "path_column": "",
    "label_column": "",
    "label_separator": "",
    "fold_case": False,
    "min_images": 1,
}


def pace_of(fields):
    return recipes.Pace(images_per_second=100.0, start_seconds=20.0)


CPU = {
    "platform": "cpu",
    "num_devices": 1,
    "fast_bfloat16": False,
    "pace_of": pace_of,
}


def examples(number=60):
    return [
        (small_layout.jpeg(20 + 3 * i % 200), LABELS[i % len(LABELS)])
        for i in range(number)
    ]


def label_file(tmp_path, text, names=("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
    """Writes images and a label file; returns both paths."""
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_layout.jpeg(50))
    file = tmp_path / "labels.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path / "photos", file


def look(root, file, **options):
    """Returns what was found, and the notes as text."""
    notes = Notes()
    found = labelled.read(root, file, notes, **(OPTIONS | options))
    return found, "\n".join(notes.lines)


def named(found):
    """Returns id -> labels."""
    return {
        name: sorted(found.labels[label] for label in entry)
        for name, entry in zip(found.ids, found.entries, strict=True)
    }


def truth(given):
    """Returns the labels of each image as `plain_data` wrote them."""
    wanted = {}
    for i, (_, labels) in enumerate(given):
        name = f"{'été' if i % 2 else 'a'}/img{i // 2:04d}"
        strange = [plain_data.STRANGE[i % 40 // 10]] if i % 10 == 0 else []
        more = {2: ["DOG"], 3: ["Dog"]}.get(i, [])
        wanted[name] = sorted({*labels, *strange, *more})
    return wanted


# Layouts.


@pytest.mark.parametrize("layout", ["row_a_label", "spaces", "json_lists", "one_hot"])
def test_every_layout_gives_the_same_labels_and_names_its_dirt(tmp_path, layout):
    given = examples()
    plain_data.LAYOUTS[layout](tmp_path, given)
    found, said = look(tmp_path / "photos", tmp_path / "labels.csv")
    assert named(found) == truth(given)
    for pattern in plain_data.DIRT:
        assert re.search(pattern, said), pattern


def test_folders_are_labels_where_there_is_no_label_file(tmp_path):
    plain_data.folders(tmp_path, examples(20))
    found, said = look(tmp_path / "photos", None)
    assert set(found.labels) == {"Dog", "Cat", "Boat", "Grass", "Water"}
    assert "folders are labels" in said


def test_folders_called_as_splits_are_splits(tmp_path):
    names = ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")
    root, _ = label_file(tmp_path, "", names)
    found, _ = look(root, None)
    assert set(found.labels) == {"cat", "dog"}
    assert [len(found.split(name)) for name in ("train", "validation")] == [2, 2]


@pytest.mark.parametrize(
    ("counted", "row_a_label", "separator"),
    [
        (["cat dog", "dog", "cat", "cat"], False, "space"),
        (["golden retriever", "labrador retriever", "poodle"], False, "none"),
        (["traffic light", "stop sign", "person"], False, "none"),
        (["traffic light", "traffic", "light"], True, "none"),
        (["a|b", "b|c", "a|c", "a|b|c", "b", "a", "c"], False, "|"),
        (["cat; dog", "dog", "cat"], False, ";"),
        (["Boat, wooden", "Boat", "Cat"], True, "none"),
        (["Boat,Cat", "Boat", "Cat"], False, ","),
        (["fox;red", "owl;night;old", "sea;blue", "sea;wave"], False, ";"),
        (["Agaric; fly", "Agaric; fly", "Bolete; bay", "Bolete; bay"], False, "none"),
        (["a man on a bench", "two dogs in snow", "the sea, calm"], False, "none"),
        (['["a"]', "[]"], False, "json"),
        (["x"], False, "none"),
    ],
)
def test_a_cell_is_a_list_only_where_its_parts_are_labels(
    counted, row_a_label, separator
):
    notes = Notes()
    given = {"row_a_label": row_a_label, "notes": notes}
    by_itself = rows.labels_of(counted, separator="", **given)
    assert by_itself == rows.labels_of(counted, separator=separator, **given)
    assert "--label_separator" in notes.lines[0] or "JSON" in notes.lines[0]


def test_a_separator_that_is_given_overrules(tmp_path):
    root, file = label_file(
        tmp_path, "path,tags\na.jpg,red fox\nb.jpg,fox\nc.jpg,red\n"
    )
    assert look(root, file)[0].labels == ["fox", "red"]
    found, _ = look(root, file, label_separator="none")
    assert found.labels == ["fox", "red", "red fox"]


def test_lists_as_python_writes_them_are_read_and_others_named():
    notes = Notes()
    found = rows.labels_of(
        ["['it''s', 'b']", '["a", null, 3]', "[a", ""],
        row_a_label=False,
        separator="json",
        notes=notes,
    )
    assert found == [["its", "b"], ["a", "3"], [], []]
    assert "1 rows whose cell is not a list of labels: '[a'" in "\n".join(notes.lines)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_lists_among_single_labels_are_refused(tmp_path, kind):
    cells = ["cat", ["cat", "dog"], "dog", "dog"]
    root, file = label_file(tmp_path, "")
    written = [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]
    table = pl.DataFrame({"path": [f"{n}.jpg" for n in "abcd"], "labels": written})
    if kind == "csv":
        table.write_csv(file)
    else:
        file = file.with_suffix(".jsonl")
        lines = zip(table["path"], cells, strict=True)
        rows = (json.dumps({"path": path, "labels": cell}) for path, cell in lines)
        file.write_text("\n".join(rows))
    with pytest.raises(InputError, match="1 different cells are JSON lists of labels"):
        look(root, file)
    found, _ = look(root, file, label_separator="none")
    assert len(found.labels) == 3


def test_half_of_a_surrogate_pair_is_replaced_before_it_is_written():
    labels = rows.labels_of(
        ['["\\ud83d", "cat"]'], row_a_label=False, separator="", notes=Notes()
    )
    assert [rows.clean(label) for label in labels[0]] == ["?", "cat"]


# The format of the file.


def test_a_first_line_that_names_an_image_is_not_taken_for_a_header(tmp_path):
    text = "a,cat\na,dog\nb,cat\nc,dog\nd,cat\n"
    place = label_file(tmp_path, text)
    with pytest.raises(InputError, match="column of paths, 'a', is the name of an im"):
        look(*place)
    found, _ = look(*place, path_column="a")
    assert named(found)["a"] == ["dog"]


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        (b"\xef\xbb\xbfpath,label\r\na.jpg,x\r\n", ["path", "label"]),
        ("path;label\na.jpg;é, x\n".encode("cp1252"), ["path", "label"]),
        ("path\tlabel\na.jpg\tx\n".encode("utf-16"), ["path", "label"]),
        (b'path , "label"\n"a.jpg" , x\n\n , \n', ["path", "label"]),
        (b"path|label\ra.jpg|x\r", ["path", "label"]),
        (b"a.jpg,x\nb.jpg,y\n", ["column_1", "column_2"]),
        (b"path;label;;\r\na.jpg;x;;\r\n;;;\r\n", ["path", "label"]),
        (b'path, "label", , \na.jpg, x, , \n', ["path", "label"]),
        (b"a.jpg;x;;\nb.jpg;y;;\n", ["column_1", "column_2"]),
        (b"path,,label,,\na.jpg,7,x,,\n", ["path", "column_2", "label"]),
        (b"sep=;\r\npath;label\r\na.jpg;1,5\r\n", ["path", "label"]),
        (b'"SEP=\t"\npath\tn\tlabel\na.jpg\t1\tx\n', ["path", "n", "label"]),
    ],
)
def test_a_file_is_read_whatever_saved_it(tmp_path, data, columns):
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    table = read_table(path, Notes())
    assert [name.strip('" ') for name in table.columns] == columns
    assert table[table.columns[0]][0].strip('"') == "a.jpg"
    assert table.height == data.count(b"jpg") or table.height == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04...", "an Excel workbook"),
        (b"path,label\na.jpg,x\nb.jpg,x,y\n", r"line 3: 3 cells, .* has 2 .*quotes"),
        (b"path\na.jpg\n", "one column"),
        (b"sep=;\r\n", "is empty"),
        (b"sep=;\r\n;;\r\n", "no rows below its header"),
        (b"path,label\n", "no rows below its header"),
        (b"path,label\n\0\0", "zero bytes"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_what_it_is(tmp_path, data, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_table(path, Notes())


FRENCH = ("château", "forêt", "été", "garçon", "église")
RUSSIAN = ("собака", "кошка", "дерево", "лодка")


@pytest.mark.parametrize(
    ("encoding", "words", "named"),
    [
        ("latin-1", FRENCH, "cp1252"),
        ("mac_roman", FRENCH, "mac_roman"),
        ("cp1250", ("łódź", "książka", "żółty", "świat"), "cp1250"),
        ("cp1251", RUSSIAN, "cp1251"),
        ("cp932", ("犬", "猫", "木", "日本語ラベル"), "cp932"),
        ("cp949", ("개", "고양이", "나무", "배"), "cp949"),
    ],
)
def test_a_legacy_encoding_is_detected_and_named(tmp_path, encoding, words, named):
    path, notes = tmp_path / "labels.csv", Notes()
    rows = "".join(f"img{i}.jpg,{word}\n" for i, word in enumerate(words * 5))
    path.write_bytes(f"path,label\n{rows}".encode(encoding))
    assert read_table(path, notes)["label"].unique(maintain_order=True).to_list() == [
        *words
    ]
    assert f"it was read as {named}, detected" in notes.lines[0]
    assert words[0] in notes.lines[0]


def test_an_encoding_that_is_not_recognised_is_refused_with_the_fix(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"path,label\na.jpg," + bytes(range(128, 256)) * 20)
    with pytest.raises(InputError, match="not recognised; save it as UTF-8"):
        read_table(path, Notes())


@pytest.mark.parametrize("kind", ["tsv", "parquet", "jsonl"])
def test_every_format_gives_the_same_labels(tmp_path, kind):
    text = "path,tags,n,split\na.jpg,x|y,1,train\nb.jpg,y,2,train\nc.jpg,x,,test\n"
    root, file = label_file(tmp_path, text)
    expected, _ = look(root, file)
    table = pl.read_csv(file).with_columns(pl.col("tags").str.split("|"))
    if kind == "tsv":
        file.write_text(text.replace(",", "\t"))
    elif kind == "parquet":
        table.write_parquet(file)
    else:
        table.write_ndjson(file)
    found, said = look(root, file)
    assert found == replace(expected, files=found.files)
    word = {"tsv": "by tabs", "parquet": "a Parquet file", "jsonl": "JSON Lines"}
    assert word[kind] in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PAR1...", "damaged Parquet"),
        (b'{"path": "a.jpg"}\n{"path"\n', "one JSON object per line"),
        (b'{\n"path": "a.jpg"}', "one JSON object per line"),
        (b"[1]", "a JSON list"),
    ],
)
def test_a_damaged_table_is_refused_by_what_it_is(tmp_path, data, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_table(path, Notes())


def test_columns_of_bytes_are_named_and_not_read(tmp_path):
    path, notes = tmp_path / "labels.parquet", Notes()
    pl.DataFrame({"path": ["a.jpg"], "image": [b"x"], "n": [3]}).write_parquet(path)
    assert read_table(path, notes).rows() == [("a.jpg", "3")]
    assert "unsupported types: 'image (Binary)'" in notes.lines[0]


# Images that paths refer to.


@pytest.mark.parametrize(
    ("written", "numbers", "rule"),
    [
        (["x/1.jpg", "y/1.jpg"], [0, 1], "relative to --images="),
        (["x/1", "y/1"], [0, 1], "relative to --images="),
        (["./x\\1.JPG", "y/1.png"], [0, 1], "relative to --images="),
        (["data/x/1.jpg", "data/y/1.jpg"], [0, 1], "without their first folder"),
        (["/other/2.jpg", "/other/3.jpg"], [2, NOWHERE], "by file name"),
        # Both are called 1: the reference is ambiguous.
        (["/other/1.jpg", "/other/2.jpg"], [NOWHERE, 2], "by file name"),
        # Of two folders, one exists: the reference is ambiguous.
        (["train/z/2.jpg", "test/z/2.jpg", "test/x/1"], [NOWHERE, NOWHERE, 0], "first"),
        # One is missing; an image of the same name elsewhere does not replace it.
        (["x/1.jpg", "y/2.jpg"], [0, NOWHERE], "relative to --images="),
    ],
)
def test_a_column_of_paths_is_read_by_one_rule(tmp_path, written, numbers, rule):
    names = ("x/1.jpg", "y/1.jpg", "z/2.jpg")
    matcher = Matcher([str(tmp_path / n) for n in names], tmp_path, tmp_path)
    match = matcher.match(written)
    assert match.rows == numbers
    assert rule in match.rule


def test_letters_with_accents_are_the_same_however_they_are_stored(tmp_path):
    apart = unicodedata.normalize("NFD", "été.jpg")
    matcher = Matcher([str(tmp_path / apart)], tmp_path, tmp_path)
    assert matcher.match([unicodedata.normalize("NFC", "été.jpg")]).rows == [0]


def test_names_that_differ_by_their_ending_need_it(tmp_path):
    files = [str(tmp_path / "a.jpg"), str(tmp_path / "a.png")]
    match = Matcher(files, tmp_path, tmp_path).match(["a.png", "a"])
    assert match.rows == [1, NOWHERE]


def test_of_two_columns_of_paths_the_better_named_counts_and_both_are_said(tmp_path):
    root, file = label_file(
        tmp_path, "copy,file,label\na.jpg,b.jpg,x\nb.jpg,a.jpg,y\nc.jpg,c.jpg,x\n"
    )
    found, said = look(root, file)
    assert named(found)["b"] == ["x"]
    assert "'copy' would also fit (--path_column)" in said
    assert named(look(root, file, path_column="copy")[0])["b"] == ["y"]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("path,label\nx.jpg,?\n", {}, "'a.jpg'. is named in any column.*'x.jpg'"),
        (
            "path,one,two\na.jpg,x,y\n",
            {},
            "cannot determine the label column.*one, two",
        ),
        (
            "path,cat,n,dog\na.jpg,yes,7,no\nb.jpg,no,7,yes\nc.jpg,no,8,yes\n",
            {},
            "'cat', 'dog' have the same two values .'no', 'yes'.; .* write 1 and 0",
        ),
        (
            "path;cat;dog\na.jpg;x;\nb.jpg;;x\n",
            {},
            "'cat', 'dog' have the same two values .'', 'x'.; .* write 1 and 0",
        ),
        (
            "path,label\na.jpg,x\n",
            {"label_column": "lable"},
            "the nearest is label; the columns are",
        ),
        ("path,label\na.jpg,x\nb.jpg,x\n", {}, "1 labels are left"),
        ("path,label,split\na.jpg,x,new\n", {}, "'split' contains 'new'; use train"),
        ("path,label,confidence\na.jpg,x,90\n", {}, "from 0 .absent. to 1"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path, text, options, words):
    with pytest.raises(InputError, match=words):
        look(*label_file(tmp_path, text), **options)


# Labels.


def test_a_column_group_among_columns_of_labels_is_a_label(tmp_path):
    text = "path,Cat,Dog,Group\na.jpg,1,0,1\nb.jpg,0,1,1\n"
    found, said = look(*label_file(tmp_path, text))
    assert "Group" in found.labels
    assert "columns read as labels, like the other 0/1 columns: 'Group'" in said


def test_columns_of_0_and_1_beside_a_column_of_labels_are_not_labels(tmp_path):
    text = "path,flipped,label,checked,group\na.jpg,1,x,0,0\nb.jpg,0,y,1,1\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.extra["group"] == ["0", "1"]
    assert found.labels == ["x", "y"]
    assert "unused columns: 'flipped', 'checked'" in said


# Among columns of 0 and 1, one label occurs, one is a label, or not all are labels.
@pytest.mark.parametrize(
    ("text", "entries", "unknown"),
    [
        ("path,Pear,Fruit,Apple\na.jpg,1,0,0\nb.jpg,1,0,\n", [[5], [5]], []),
        ("path,Pear\na.jpg,1\nb.jpg,0\n", [[5]], []),
        ("path,Pear,caption\na.jpg,1,a tree\nb.jpg,1,b\n", [[5], [5]], []),
        ("path,Pear,sharp,wide\na.jpg,1,1,70\nb.jpg,1,0,80\n", [[5], [5]], ["sharp"]),
        ("path,Pear,group\na.jpg,1,0\nb.jpg,1,1\n", [[5], [5]], []),
        ("path,/m/3,label\na.jpg,0,Pear\nb.jpg,1,FRUIT\n", [[5]], ["FRUIT"]),
    ],
)
def test_columns_of_0_and_1_that_are_labels_of_the_run_are_recognised(
    tmp_path, text, entries, unknown
):
    found, _ = look(*label_file(tmp_path, text), vocabulary=KNOWN)
    assert [list(entry) for entry in found.entries] == entries
    assert found.unused == unknown
    assert "group" not in found.extra or found.extra["group"] == ["0", "1"]


def test_a_column_called_as_another_kind_is_a_label_if_it_is_one_of_the_run(tmp_path):
    known = Vocabulary(("group", "cat"), ("group", "cat"))
    text = "path,cat,group\na.jpg,1,0\nb.jpg,0,1\n"
    found, _ = look(*label_file(tmp_path, text), vocabulary=known)
    assert [list(entry) for entry in found.entries] == [[1], [0]]


@pytest.mark.parametrize(
    "cells", [("yes", "no", "yes"), ("1", "-1", "-1"), ("0.9", "0.2", "0.8")]
)
def test_a_column_that_is_a_label_of_the_run_is_never_absent_because_of_its_cells(
    tmp_path, cells
):
    known = Vocabulary(("cat", "dog", "bird"), ("cat", "dog", "bird"))
    lines = [f"{'abc'[i]}.jpg,{i % 2},{cell}" for i, cell in enumerate(cells)]
    place = label_file(tmp_path, "\n".join(["path,cat,bird", *lines]))
    with pytest.raises(InputError, match="columns 'bird' are labels of the run, but"):
        look(*place, vocabulary=known)


@pytest.mark.parametrize("label", ["0", "1"])
def test_labels_called_0_and_1_are_not_columns_of_0_and_1(tmp_path, label):
    known = Vocabulary(("0", "1"), ("zero", "one"))
    text = f"path,digit\na.jpg,{label}\n"
    found, _ = look(*label_file(tmp_path, text), vocabulary=known)
    assert [list(entry) for entry in found.entries] == [[int(label)]]


def test_case_is_folded_only_when_asked(tmp_path):
    text = "path,label\na.jpg,Dog\nb.jpg,Dog\nc.jpg,dog\nd.jpg,cat\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["Dog", "cat", "dog"]
    assert "--fold_case" in said
    found, _ = look(tmp_path / "photos", tmp_path / "labels.csv", fold_case=True)
    assert found.labels == ["Dog", "cat"]


# Labels of a trained run: two differ only in case, two share a name, and one has as
# code the name of another in another case.
KNOWN = Vocabulary(
    ("Apple", "apple", "/m/1", "/m/2", "PEAR", "/m/3"),
    ("Apple", "apple", "Fan", "Fan", "Fruit", "Pear"),
)


@pytest.mark.parametrize(
    ("written", "ids"),
    [
        # As in the run.
        (["Apple", "apple", "apple", "Apple"], [0, 1, 1, 0]),
        (["Pear", "PEAR", "PEAR", "/m/2"], [5, 4, 4, 3]),
        # In another case.
        (["FRUIT", "fruit", "Fruit", "/M/1"], [4, 4, 4, 2]),
        (["APPLE", "Apple", "fan", "pear"], [None, 0, None, None]),
    ],
)
def test_with_case_folded_no_label_of_a_run_is_taken_for_another(
    tmp_path, written, ids
):
    rows = zip("abcd", written, strict=True)
    text = "path,label\n" + "".join(f"{name}.jpg,{label}\n" for name, label in rows)
    place = label_file(tmp_path, text)
    found, said = look(*place, fold_case=True, vocabulary=KNOWN)
    chosen = dict(zip(found.ids, map(list, found.entries), strict=True))
    wanted = zip("abcd", ids, strict=True)
    assert chosen == {name: [i] for name, i in wanted if i is not None}
    several = [label for label, i in zip(written, ids, strict=True) if i is None]
    fit = "of them match several labels of the run if case is ignored"
    assert (f"{len(several)} {fit}" in said) == bool(several)
    assert all(repr(label) in said.partition(fit)[2] for label in several)


def test_without_folding_labels_in_another_case_are_left_out_and_said(tmp_path):
    text = "path,label\na.jpg,apple\nb.jpg,APPLE\nc.jpg,FRUIT\nd.jpg,Fan\n"
    found, said = look(*label_file(tmp_path, text), vocabulary=KNOWN)
    assert [list(entry) for entry in found.entries] == [[1]]
    assert "(--fold_case matches them): 'FRUIT'" in said
    assert "use the codes of the labels: 'APPLE', 'Fan'" in said


def test_rare_labels_stay_unless_told_and_their_images_are_named(tmp_path):
    text = "path,label\na.jpg,x\nb.jpg,x\nc.jpg,y\nb.jpg,y\nd.jpg,z\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["x", "y", "z"]
    assert "fewer than 10 training images" in said
    place = tmp_path / "photos", tmp_path / "labels.csv"
    found, said = look(*place, min_images=2)
    assert found.labels == ["x", "y"]
    assert "1 labels with fewer than 2 training images: 'z'" in said
    assert "1 images whose labels are all left out: 'd.jpg'" in said


def test_a_column_that_is_no_label_because_of_a_cell_is_named(tmp_path):
    text = "path,x,y,z,views\na.jpg,1,0,1,7\nb.jpg,0,1,-1,8\nc.jpg,1,1,0,9\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["x", "y"]
    note = "column 'z' is not used as a label: 1 cells are not 0, 1 or empty: '-1'"
    assert note in said
    assert "column 'views'" not in said


def test_objects_in_a_list_are_no_labels(tmp_path):
    text = 'path;labels\na.jpg;["x"]\nb.jpg;[{"name": "x"}]\nc.jpg;["y", 3]\n'
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["3", "x", "y"]
    assert "1 rows whose cell is not a list of labels" in said


def test_confidences_are_kept_and_contradictions_said(tmp_path):
    text = (
        "path,label,confidence\na.jpg,x,1\na.jpg,y,0\nb.jpg,y,0.75\nb.jpg,y,1\n"
        "c.jpg,x,often\nc.jpg,x,1\n"
    )
    found, said = look(*label_file(tmp_path, text))
    assert found.entries[0] == {0: 1.0, 1: 0.0}
    assert found.entries[1] == {1: 1.0}
    assert "if a label of an image has different confidences" in said
    assert "1 rows whose confidence is not a number: 'often'" in said


def test_rows_of_0_and_1_that_contradict_each_other_are_said(tmp_path):
    text = "path,cat,dog\na.jpg,0,1\nb.jpg,1,0\na.jpg,1,0\na.jpg,0,0\nb.jpg,1,0\n"
    found, said = look(*label_file(tmp_path, text))
    assert named(found) == {"a": ["cat", "dog"], "b": ["cat"]}
    assert "1 images have rows with different labels; a label that is 1 in" in said
    assert "counts as present: 'a.jpg'" in said


def test_equal_rows_of_0_and_1_are_no_contradiction(tmp_path):
    text = "path,cat,dog\na.jpg,0,1\nb.jpg,1,0\na.jpg,0,1\n"
    assert "different labels" not in look(*label_file(tmp_path, text))[1]


def test_codes_have_no_white_space_and_stay_different(tmp_path):
    text = "path,label\na.jpg,New York\nb.jpg,New_York\nc.jpg,New  York\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["New York", "New_York"]
    assert found.codes == ["New_York_2", "New_York"]
    assert "extra spaces" in said


def test_a_column_of_row_numbers_does_not_name_the_images(tmp_path):
    names = [f"{i}.jpg" for i in range(6)]
    rows_ = "".join(f"{i},{5 - i}.jpg,label{5 - i}\n" for i in range(6))
    found, _ = look(*label_file(tmp_path, "id,img_path,label\n" + rows_, names))
    assert named(found) == {str(i): [f"label{i}"] for i in range(6)}


def test_a_missing_image_is_not_its_namesake_elsewhere(tmp_path):
    names = [f"train/{i}.jpg" for i in range(5)] + ["extra/9.jpg"]
    text = "path,label\n" + "".join(f"train/{i}.jpg,{i % 2}\n" for i in range(5))
    found, said = look(*label_file(tmp_path, text + "test/9.jpg,zebra\n", names))
    assert found.labels == ["0", "1"]
    assert "test/9.jpg" in said


def test_a_missing_png_is_not_the_jpeg_of_its_name(tmp_path):
    text = "path,label\na.jpg,dog\na.png,cat\nb.jpg,cow\nc.jpg,dog\n"
    found, said = look(*label_file(tmp_path, text))
    assert found.labels == ["cow", "dog"]
    assert "a.png" in said


def test_words_of_an_array_are_labels_of_their_own(tmp_path):
    text = "path,labels\na.jpg,['dog' 'pet']\nb.jpg,['dog']\n"
    found, _ = look(*label_file(tmp_path, text))
    assert sorted(found.labels) == ["dog", "pet"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    text = "path,dog,cat,dog\na.jpg,1,0,1\nb.jpg,0,1,0\n"
    with pytest.raises(InputError, match="two columns named 'dog'"):
        look(*label_file(tmp_path, text))


def test_an_empty_split_leaves_the_word_to_another_row(tmp_path):
    text = "path,label,split\na.jpg,x,\na.jpg,y,test\nb.jpg,x,\nc.jpg,y,train\n"
    found, _ = look(*label_file(tmp_path, text))
    assert sorted(found.extra["split"]) == ["test", "train", "train"]


def test_images_may_be_in_the_tuning_split(tmp_path):
    text = "path,label,split\na.jpg,x,train\nb.jpg,y,train\nc.jpg,x,Tuning\n"
    found, said = look(*label_file(tmp_path, text + "c.jpg,z,\nd.jpg,y,test\n"))
    assert found.split("tuning") == [2]
    # Labels of tuning are not used: they add no label to train.
    assert found.labels == ["x", "y"]
    assert "1 labels without a training image: 'z'" in said
    splits = [draft.plan.split for draft in found.drafts()]
    assert splits == ["train", "tuning", "test"]


def test_a_group_on_two_sides_is_said(tmp_path):
    text = "path,label,split,group\na.jpg,x,train,g\nb.jpg,y,train,h\nc.jpg,x,test,g\n"
    _, said = look(*label_file(tmp_path, text))
    assert "1 groups have images in more than one split" in said


def test_groups_are_one_however_they_are_typed_but_for_case(tmp_path):
    text = "path,label,group\na.jpg,x,Jose\u0301  P\nb.jpg,y,Jos\xe9 P\n"
    found, said = look(*label_file(tmp_path, text + "c.jpg,x,jos\xe9 p\n"))
    assert found.extra["group"] == ["Jos\xe9 P", "Jos\xe9 P", "jos\xe9 p"]
    assert "ignored in column group; 1 spellings were changed" in said
    assert "2 values of column group differ only in case and are kept separate" in said


def test_images_without_a_domain_are_no_domain_called_all(tmp_path):
    text = "path,label,split,domain,slice\na.jpg,x,train,home,\nb.jpg,y,train,,\n"
    found, said = look(*label_file(tmp_path, text + "c.jpg,x,test,,\n"))
    tables = [draft.plan.table for draft in found.drafts()]
    assert [list(table["domain"]) for table in tables] == [
        ["home", "no domain"],
        ["no domain"],
    ]
    assert [set(table["slice"]) for table in tables] == [{"all"}, {"all"}]
    assert "2 images without a domain get the domain 'no domain'" in said
    assert "without a slice" not in said


def test_no_control_character_of_a_label_reaches_the_terminal():
    assert shown(["\x1b[31mred", "a\u202eb"]) == r"'\x1b[31mred', 'a\u202eb'"


# Images.


def broken_images():
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    jpeg, png, webp = (
        cv2.imencode(kind, noise)[1].tobytes() for kind in (".jpg", ".png", ".webp")
    )
    return {
        "whole.jpg": (jpeg, ""),
        "whole.png": (png, ""),
        "whole.webp": (webp, ""),
        "cut.jpg": (jpeg[:-200], "truncated"),
        "cut.png": (png[:-200], "truncated"),
        "cut.webp": (webp[:-200], "truncated"),
        "head.jpg": (jpeg[:100], "JPEG"),
        "head.png": (png[:18], "PNG"),
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<html>", "HTML"),
        "movie.jpg": (b"GIF89a", "GIF"),
    }


@pytest.mark.parametrize("most_decoded", [0, 100])
def test_broken_images_are_found_by_header_and_by_decoding(
    tmp_path, monkeypatch, most_decoded
):
    monkeypatch.setattr(images, "MOST_DECODED", most_decoded)
    made = broken_images()
    for name, (content, _) in made.items():
        (tmp_path / name).write_bytes(content)
    checked = images.check([str(tmp_path / name) for name in made])
    assert checked.decoded == (most_decoded > 0)
    assert checked.short_sides.tolist() == [64] * 3
    for number, (name, (_, why)) in enumerate(made.items()):
        assert why in checked.broken.get(number, "-" if why else ""), name


def test_hidden_folders_are_neither_labels_nor_images(tmp_path):
    names = ("cat/a.jpg", "dog/b.jpg", ".thumbs/a.jpg", "__MACOSX/dog/b.jpg")
    root, file = label_file(tmp_path, "path,label\na.jpg,cat\nb.jpg,dog\n", names)
    found, said = look(root, None)
    assert named(found) == {"a": ["cat"], "b": ["dog"]}
    assert "other files are skipped: 2 hidden" in said
    assert named(look(root, file)[0]) == named(found)


def test_images_below_a_hidden_folder_are_not_hidden(tmp_path):
    text = "path,label\na.jpg,cat\nb.jpg,dog\n"
    for name in (".photos", "__MACOSX"):
        found, _ = look(*label_file(tmp_path / name, text))
        assert named(found) == {"a": ["cat"], "b": ["dog"]}


def test_a_link_to_a_folder_takes_no_image_from_it(tmp_path):
    names = [f"{label}/{label}.jpg" for label in ("bird", "cat", "dog")]
    rows_ = "".join(f"{name},{name[:3]}\n" for name in names)
    root, file = label_file(tmp_path, "path,label\n" + rows_, names)
    # A folder may be listed in any order, so each link could be read first.
    for one in ("bird", "cat", "dog"):
        for other in ("bird", "cat", "dog"):
            (root / one / f"to_{other}").symlink_to(f"../{other}")
    found, said = look(root, None)
    assert named(found) == {"bird": ["bird"], "cat": ["cat"], "dog": ["dog"]}
    assert "9 links to folders that are read by another path: 'bird/to_bird'" in said
    assert "that match no image" not in look(root, file)[1]


def test_a_folder_without_images_says_what_is_in_it(tmp_path):
    (tmp_path / "a.tiff").write_bytes(b"II")
    with pytest.raises(InputError, match=r"contains no images.*\.tiff"):
        images.find(tmp_path, Notes())


# The recipe.


def facts(**changes):
    return recipes.Facts(
        **{
            "name": "mine",
            "num_images": 500,
            "num_evaluated": 50,
            "num_groups": 500,
            "num_domains": 1,
            "num_labels": 20,
            "short_side": 300,
            "has_validation": False,
            "platform": "cpu",
            "num_devices": 1,
            "fast_bfloat16": False,
            **changes,
        }
    )


def test_a_recipe_computes_in_bfloat16_where_that_is_faster():
    def dtype(**changes):
        pace = recipes.Pace(images_per_second=100.0, start_seconds=10.0)
        chosen = recipes.choose(facts(**changes), lambda fields: pace)
        values = {choice.field: choice.value for choice in chosen.choices}
        return values.get("model.compute_dtype", "the default")

    assert dtype() == "float32"
    assert dtype(fast_bfloat16=True) == "bfloat16"
    assert dtype(fast_bfloat16=True, platform="gpu") == "the default"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("num_images", [3, 40, 5_000, 2_000_000])
def test_every_recipe_passes_check(tmp_path, platform, num_images):
    given = facts(
        platform=platform,
        num_images=num_images,
        num_groups=num_images,
        num_devices=6,
        short_side=20,
    )
    file = tmp_path / "mine.py"
    file.write_text(recipes.text(given, recipes.choose(given, pace_of), "a command"))
    config = Config.resolve(runpy.run_path(str(file))["get_config"]())
    assert config.global_batch_size % 6 == 0
    assert config.data.directory == str(tmp_path / "data")


def test_every_choice_is_a_field_with_a_reason():
    config = default_config()
    for choice in recipes.choose(facts(), pace_of).choices:
        config.update_from_flattened_dict({choice.field: choice.value})
        assert choice.why


def test_the_epochs_fill_the_minutes_and_the_estimate_says_so():
    chosen = {
        minutes: recipes.choose(facts(num_images=9_000), pace_of, minutes=minutes)
        for minutes in (10.0, 30.0, 90.0)
    }
    epochs = {
        minutes: recipe.stages[0]["num_epochs"] for minutes, recipe in chosen.items()
    }
    for minutes, recipe in chosen.items():
        assert recipe.minutes == pytest.approx(minutes, rel=0.05)
    # 100 images per second of 8,100, minus start-up and evaluations.
    assert epochs[30.0] == pytest.approx((1800 - 51) / 81, rel=0.05)
    assert epochs[10.0] < epochs[30.0] < epochs[90.0]


def test_the_rest_of_the_time_is_for_runs_without_each_domain():
    def length(minutes, num_domains=3, **changes):
        given = facts(num_images=3_000, num_domains=num_domains, **changes)
        return recipes.choose(given, pace_of, minutes=minutes).hold_out_length

    # 100 epochs of 2,700 images take 2,700 s. Each image is in two of three runs, whose
    # start-up and evaluations are counted, also on the images that they hold out.
    each = pace_of({}).start_seconds + 16 * 350 / 300
    others = 3 * each + 16 * 2_700 / 300
    assert length(90.0) == pytest.approx(
        (5_400 - 2_700 - each - others) / 5_400, rel=0.02
    )
    assert length(180.0) == 1.0
    assert length(90.0, num_domains=1) == 0.0
    assert length(90.0, num_domains=6) == 0.0
    assert length(30.0) == 0.0
    assert length(None, platform="gpu") == 0.0


def test_only_long_runs_on_cpus_mix_images():
    def mixed(minutes, platform="cpu"):
        given = facts(num_images=3_000, platform=platform)
        chosen = recipes.choose(given, pace_of, minutes=minutes)
        choices = {choice.field: choice.value for choice in chosen.choices}
        long = chosen.stages[0]["num_epochs"] >= recipes.LONG_EPOCHS
        return long, choices.get("data.mix_probability")

    assert mixed(10.0) == (False, None)
    assert mixed(30.0) == (True, 0.5)
    assert mixed(30.0, "gpu") == (True, None)


def test_small_data_trains_a_limited_number_of_epochs_and_large_data_one():
    few = recipes.choose(facts(num_images=40), pace_of)
    many = recipes.choose(facts(num_images=2_000_000), pace_of)
    assert few.stages[0]["num_epochs"] == recipes.MOST_EPOCHS
    assert few.minutes < 5
    assert many.stages[0]["num_epochs"] == recipes.FEWEST_EPOCHS
    assert many.minutes > 200


# The whole command.


@pytest.fixture
def made(tmp_path, capsys):
    """Data with a split column after `new`: its folder and words."""
    plain_data.json_lists(tmp_path, examples())
    new(
        tmp_path / "mine",
        images=tmp_path / "photos",
        labels=tmp_path / "labels.csv",
        **OPTIONS,
        **CPU,
    )
    return tmp_path / "mine", capsys.readouterr().out


def opened(folder):
    return open_prepared(
        folder / "data",
        validation_fraction=0.1,
        machine_labels="ignored",
        machine_threshold=0.5,
    )


def test_new_prepares_the_data_and_changes_no_image(made):
    folder, said = made
    assert not list(folder.rglob("*.jpg"))
    data = opened(folder)
    sizes = {name: split.num_examples for name, split in data.splits.items()}
    assert sizes == {"train": 48, "validation": 6, "test": 6}
    for name, size in sizes.items():
        assert f"prepared  {name}: {size} images read, {size} kept" in said
    wanted = truth(examples())
    for split in data.splits.values():
        for row in range(split.num_examples):
            record = split.source[row]
            labels = data.vocabulary.names(record["label_ids"])
            assert sorted(labels) == wanted[split.index.image_ids[row]]


def test_new_says_that_more_minutes_would_add_no_epochs(made):
    folder, said = made
    assert "'num_epochs': 100.0" in (folder / "mine.py").read_text()
    assert "(100, as in this recipe, is the most)" in said


def test_new_prepares_a_tuning_split_that_training_and_submissions_do_not_use(made):
    folder, _ = made
    file, place = folder.parent / "labels.csv", folder.parent / "tuned"
    file.write_text(file.read_text().replace(",test\n", ",tuning\n"))
    new(place, images=folder.parent / "photos", labels=file, **OPTIONS, **CPU)
    before, data = opened(folder), opened(place)
    assert data.split("tuning").num_examples == before.split("test").num_examples
    ids = [d.split("train").index.image_ids.tolist() for d in (before, data)]
    assert ids[0] == ids[1]
    assert not data.submission_ids
    labels = data.split("tuning").index
    np.testing.assert_array_equal(
        labels.label_ids, before.split("test").index.label_ids
    )


def content(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def again(tmp_path, **options):
    new(
        tmp_path / "mine",
        images=tmp_path / "photos",
        labels=tmp_path / "labels.csv",
        **(OPTIONS | CPU | options),
    )


def test_data_that_did_not_change_is_not_prepared_again(made, tmp_path, capsys):
    recipe = made[0] / "mine.py"
    recipe.write_text(recipe.read_text() + "# mine\n")
    before = content(made[0])
    again(tmp_path)
    assert content(made[0]) == before
    assert "mine.py already exists; keeping it" in capsys.readouterr().out


def test_a_label_file_that_changed_is_refused(made, tmp_path):
    file = tmp_path / "labels.csv"
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(InputError, match="was prepared from other files"):
        again(tmp_path)


def test_new_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    plain_data.json_lists(tmp_path, examples())
    monkeypatch.setattr(shards, "SHARD_IMAGES", 16)
    again(tmp_path)
    whole = content(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine")
    write_shard, written = shards.write_shard, []

    def interrupted(path, part, **more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_shard(path, part, **more)

    monkeypatch.setattr(shards, "num_cores", lambda: 1)
    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path)
    assert not (tmp_path / "mine" / "mine.py").exists()
    begun = content(tmp_path / "mine")
    monkeypatch.setattr(shards, "write_shard", write_shard)
    again(tmp_path)
    resumed = content(tmp_path / "mine")
    assert {name: data for name, (_, data) in resumed.items()} == {
        name: data for name, (_, data) in whole.items()
    }
    for name in written:
        path = str(tmp_path / "mine" / "data" / name)
        assert resumed[path] == begun[path]


def test_new_prints_every_field_it_sets_and_the_commands_that_follow(made):
    folder, said = made
    config = Config.resolve(runpy.run_path(str(folder / "mine.py"))["get_config"]())
    default = default_config().to_dict()
    for line in differences(default, config.to_dict()):
        field = line.partition(":")[0]
        if field.startswith("data.d") or "stages" in field:
            continue
        assert re.search(rf"^recipe +{re.escape(field)} = ", said, re.M), field
    assert said.count("python -m jaxii.main") == 1
    assert f"train --config={folder}/mine.py" in said


def test_new_prints_commands_that_use_the_rest_of_the_time_for_new_domains(
    tmp_path, capsys
):
    rows = [f"{i}.jpg,{'xyz'[i % 3]},{'ab'[i % 2]}" for i in range(60)]
    text = "\n".join(["path,label,domain", *rows])
    root, file = label_file(tmp_path, text, [f"{i}.jpg" for i in range(60)])
    new(tmp_path / "mine", images=root, labels=file, **OPTIONS, **CPU)
    lines = capsys.readouterr().out.splitlines()
    prefix = "  python -m jaxii.main "
    printed = [line for line in lines if line.startswith(prefix)]
    names = [line.removeprefix(prefix).split()[0] for line in printed]
    assert names == ["train", "hold_out", "evaluate"]
    train, hold_out, evaluate = (
        parse(name, ["jaxii", *shlex.split(line.removeprefix(prefix))[1:]])
        for name, line in zip(names, printed, strict=True)
    )
    assert hold_out.workdir == evaluate.workdir == train.workdir
    assert hold_out.length == 1.0
    assert evaluate.tune_on == "held_out"


def test_a_folder_of_something_else_is_never_written_into(tmp_path):
    plain_data.json_lists(tmp_path, examples())
    (tmp_path / "mine" / "notes").mkdir(parents=True)
    (tmp_path / "mine" / "notes" / "todo.txt").write_text("x")
    before = content(tmp_path / "mine")
    with pytest.raises(InputError, match="files that new did not write"):
        again(tmp_path)
    assert content(tmp_path / "mine") == before


def test_new_starts_again_where_it_was_killed_before_its_first_file(tmp_path):
    plain_data.json_lists(tmp_path, examples())
    data = tmp_path / "mine" / "data"
    data.mkdir(parents=True)
    for name in (LOCK, ".preparation.json.0123abcd.part"):
        (data / name).write_text("{")
    again(tmp_path)
    assert (tmp_path / "mine" / "mine.py").exists()
    assert not list(data.glob(".*"))


def test_a_refusal_leaves_nothing_and_says_what_was_found(tmp_path, capsys):
    root, file = label_file(tmp_path, "path,label\na.jpg,x\nb.jpg,x\n")
    with pytest.raises(InputError, match="1 labels are left"):
        new(tmp_path / "mine", images=root, labels=file, **OPTIONS, **CPU)
    assert not (tmp_path / "mine").exists()
    assert "column 'path' names the images" in capsys.readouterr().out


def test_codes_of_labels_with_spaces_can_be_submitted_and_read_back(tmp_path):
    names = ("people & body", "a, b", 'say "x"', "bell\x07", "é\u00a0é", "plain")
    rows = [[f"{i}.jpg", name] for i, name in enumerate(names)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["path", "label"], *rows])
    images, file = label_file(tmp_path, text.getvalue(), [row[0] for row in rows])
    options = OPTIONS | {"label_separator": "none"}
    new(tmp_path / "mine", images=images, labels=file, **options, **CPU)
    dataset = open_dataset(tmp_path / "mine" / "data")
    codes = label_files.Codes(dataset.vocabulary, frozenset(), "labels.csv")
    assert set(codes.vocabulary.descriptions) >= {"people & body", "plain"}
    index = dataset.splits["train"].index
    answers = [index.label_ids[i : i + 1] for i in range(len(names))]
    path = tmp_path / "submission.csv"
    ids = index.image_ids.tolist()
    write_submission(path, ids, answers, codes.vocabulary, dict)
    entries, tally, listed = label_files.read_image_labels(
        path, codes, pl.Series(ids), header=True
    )
    assert listed.to_list() == ids
    assert entries.labels.tolist() == [int(answer[0]) for answer in answers]
    assert tally.kept == tally.read == len(names)
    with path.open(newline="") as opened:
        assert all(len(row["labels"].split()) == 1 for row in csv.DictReader(opened))


def test_ids_that_differ_by_case_alone_are_said_and_kept_apart(tmp_path):
    names = ("a.jpg", "A.jpg", "007.jpg", "7.jpg")
    text = "path,label\na,x\nA,y\n007,x\n7,y\n"
    found, said = look(*label_file(tmp_path, text, names))
    assert named(found) == {"a": ["x"], "A": ["y"], "007": ["x"], "7": ["y"]}
    assert "2 ids that differ only in case" in said
