import re

import polars as pl
import pytest
from small_layout import lines

from jaxii.errors import InputError
from jaxii.prepare import label_files
from jaxii.prepare.tables import csv_rows

HEADER = "ImageID,Source,LabelName,Confidence"
IMAGES = pl.Series(["a", "b", "c"])


@pytest.fixture
def codes(tmp_path):
    trainable = lines(tmp_path / "classes.csv", "label_code", "/m/2", "/m/1")
    described = "/m/1,One", "/m/2,Two", "/m/3,Three"
    descriptions = lines(tmp_path / "all.csv", "label_code,description", *described)
    return label_files.read_codes(trainable, descriptions)


def read(tmp_path, codes, *rows, header=HEADER):
    path = lines(tmp_path / "labels.csv", header, *rows)
    entries, tally = label_files.read_labels(path, codes, IMAGES)
    columns = entries.rows, entries.labels, entries.confidences
    return list(zip(*(c.tolist() for c in columns), strict=True)), tally


def test_class_order_is_that_of_the_trainable_file(codes):
    assert codes.vocabulary.codes == ("/m/2", "/m/1")
    assert codes.vocabulary.descriptions == ("Two", "One")


def test_without_descriptions_the_code_stands_for_itself(tmp_path):
    path = lines(tmp_path / "c.csv", "label_code", "/m/1")
    assert label_files.read_codes(path, None).vocabulary.descriptions == ("/m/1",)


def test_descriptions_without_a_code_are_left_out(tmp_path):
    trainable = lines(tmp_path / "c.csv", "label_code", "/m/1")
    described = "/m/1,One", "", ",Nothing", "/m/3,Three"
    path = lines(tmp_path / "all.csv", "label_code,description", *described)
    codes = label_files.read_codes(trainable, path)
    assert codes.known == {"/m/1", "/m/3"}
    assert codes.table().rows() == [("/m/1", 0), ("/m/3", -1)]


def test_a_class_listed_twice_is_refused(tmp_path):
    path = lines(tmp_path / "c.csv", "label_code", "/m/1", "/m/1")
    with pytest.raises(InputError, match="/m/1 is listed twice"):
        label_files.read_codes(path, None)


def test_no_class_is_refused(tmp_path):
    path = lines(tmp_path / "c.csv", "label_code")
    with pytest.raises(InputError, match="lists no classes"):
        label_files.read_codes(path, None)


def test_rows_become_numbers(tmp_path, codes):
    rows, tally = read(tmp_path, codes, "c,verification,/m/2,1", "a,machine,/m/1,0.5")
    assert rows == [(0, 1, 0.5), (2, 0, 1.0)]
    assert (tally.read, tally.kept) == (2, 2)


def test_verified_absence_is_kept(tmp_path, codes):
    assert read(tmp_path, codes, "a,verification,/m/1,0")[0] == [(0, 1, 0.0)]


def test_repeated_rows_are_merged_and_counted(tmp_path, codes):
    rows, tally = read(tmp_path, codes, "a,v,/m/1,0", "a,v,/m/1,1", "a,v,/m/1,1")
    assert rows == [(0, 1, 1.0)]
    assert tally.dropped["repeated"] == 2


def test_described_but_not_trainable_codes_are_counted(tmp_path, codes):
    rows, tally = read(tmp_path, codes, "a,v,/m/3,1", "a,v,/m/1,1")
    assert len(rows) == 1
    assert tally.dropped["label not trainable"] == 1


def test_few_unknown_codes_are_counted_with_an_example(tmp_path, codes):
    good = [f"{i},v,/m/1,1" for i in "abc"] * 10
    _, tally = read(tmp_path, codes, *good, "a,v,/m/odd,1")
    assert tally.dropped["unknown label code"] == 1
    assert tally.examples["unknown label code"] == ("/m/odd",)


def test_many_unknown_codes_are_refused_with_the_first(tmp_path, codes):
    with pytest.raises(InputError, match=r"2 of 3 rows .*first: '/m/odd'"):
        read(tmp_path, codes, "a,v,/m/1,1", "a,v,/m/odd,1", "b,v,/m/even,1")


def test_many_unknown_codes_without_descriptions_name_the_file_to_add(tmp_path, codes):
    bare = label_files.read_codes(tmp_path / "classes.csv", None)
    rows = "a,v,/m/1,1", "b,v,/m/3,1"
    assert read(tmp_path, codes, *rows)[1].kept == 1
    words = (
        r"missing from classes.csv. No class descriptions .*add class-descriptions.csv"
    )
    with pytest.raises(InputError, match=words):
        read(tmp_path, bare, *rows)


def test_rows_of_missing_images_are_counted_with_examples(tmp_path, codes):
    rows, tally = read(
        tmp_path, codes, "a,v,/m/1,1", "z,v,/m/1,1", "z,v,/m/2,1", "y,v,/m/1,1"
    )
    assert len(rows) == 1
    assert tally.dropped["image missing"] == 3
    assert tally.examples["image missing"] == ("y", "z")
    assert tally.notes["distinct missing images"] == 2


def test_every_row_is_accounted_for(tmp_path, codes):
    good = [f"{i},v,/m/1,1" for i in "abc"] * 10
    _, tally = read(tmp_path, codes, *good, "a,v,/m/odd,1", "z,v,/m/1,1", "a,v,/m/3,1")
    assert tally.read == tally.kept + sum(tally.dropped.values())


def test_further_columns_are_not_looked_at(tmp_path, codes):
    boxes = HEADER + ",XMin,XMax,YMin,YMax"
    rows, _ = read(tmp_path, codes, "a,xclick,/m/1,1,0,1,0,1", header=boxes)
    assert rows == [(0, 1, 1.0)]


def test_a_wrong_header_is_refused_with_both_headers(tmp_path, codes):
    with pytest.raises(InputError, match=r"id,label;.*ImageID,LabelName,Confidence"):
        read(tmp_path, codes, "a,/m/1", header="id,label")


@pytest.mark.parametrize("confidence", ["1.5", "-0.1", "yes", "", "nan"])
def test_a_confidence_outside_the_range_is_refused(tmp_path, codes, confidence):
    with pytest.raises(InputError, match="must be a number from 0 to 1"):
        read(tmp_path, codes, "b,v,/m/1,1", f"a,v,/m/1,{confidence}")


def test_an_empty_file_is_refused(tmp_path, codes):
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(InputError, match="cannot be read as CSV"):
        label_files.read_labels(tmp_path / "labels.csv", codes, IMAGES)


def test_an_absent_file_is_refused(tmp_path, codes):
    with pytest.raises(InputError, match="cannot be read as CSV"):
        label_files.read_labels(tmp_path / "none.csv", codes, IMAGES)


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path, codes):
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\na,v,/m/1,1\r\n".encode())
    _, tally = label_files.read_labels(path, codes, IMAGES)
    assert tally.kept == 1


def test_a_file_without_rows_is_no_error(tmp_path, codes):
    rows, tally = read(tmp_path, codes)
    assert rows == [] and tally.read == 0


def test_label_lists_are_split_at_spaces(tmp_path, codes):
    path = lines(tmp_path / "t.csv", "a,/m/1 /m/2", "b,", "c,/m/1")
    entries, tally, listed = label_files.read_image_labels(
        path, codes, IMAGES, header=False
    )
    assert entries.rows.tolist() == [0, 0, 2]
    assert entries.labels.tolist() == [0, 1, 1]
    assert listed.to_list() == ["a", "b", "c"]
    assert tally.read == 3


def test_an_image_listed_without_labels_stays_listed(tmp_path, codes):
    path = lines(tmp_path / "t.csv", "image_id,labels", "a,", "b,")
    _, _, listed = label_files.read_image_labels(path, codes, IMAGES, header=True)
    assert listed.to_list() == ["a", "b"]


def test_an_unexpected_header_is_refused(tmp_path):
    path = lines(tmp_path / "t.csv", "image_id,labels", "a,/m/1")
    with pytest.raises(InputError, match="must not have one"):
        label_files.read_rows(path, header=False)


def test_metadata_keeps_the_first_row_of_an_image(tmp_path):
    path = lines(tmp_path / "m.csv", "image_id,slice,source", "a,x,1", "a,y,2", "b,,3")
    table, tally = label_files.read_metadata(path, IMAGES)
    nothing = (None, None, None)
    assert table.rows() == [(None, None, "x"), nothing, nothing]
    assert tally.dropped["repeated"] == 1


def test_values_of_metadata_are_one_however_they_are_typed(tmp_path):
    rows = "a,Jose\u0301  P,eu", "b,Jos\xe9 P,EU"
    path = lines(tmp_path / "m.csv", "image_id,group,domain", *rows)
    table, tally = label_files.read_metadata(path, IMAGES)
    assert table["group"].to_list() == ["Jos\xe9 P", "Jos\xe9 P", None]
    assert "domains that differ only in case 2 (EU, eu)" in tally.line()
    assert "groups that differ" not in tally.line()


@pytest.mark.parametrize(
    ("header", "name", "meant"),
    [
        ("image_id, group,domain", " group", "group"),
        ("image_id,Group,domain", "Group", "group"),
        ("image_id,SLICE,colour", "SLICE", "slice"),
        ("image_id,group,Image ID", "Image ID", "image_id"),
        ("image_id,group,Group", "Group", "group"),
    ],
)
def test_a_misspelt_column_of_metadata_is_refused(tmp_path, header, name, meant):
    path = lines(tmp_path / "m.csv", header, "a,x,y")
    words = f"m.csv has the column {name!r}, which is not read; rename it to {meant}"
    with pytest.raises(InputError, match=words):
        label_files.read_metadata(path, IMAGES)


def test_unused_columns_of_metadata_are_named(tmp_path):
    path = lines(tmp_path / "m.csv", "image_id,groups,domain,source", "a,x,eu,1")
    _, tally = label_files.read_metadata(path, IMAGES)
    assert "columns that are not used 2 (groups, source)" in tally.line()
    path = lines(tmp_path / "m.csv", "image_id,domain", "a,eu")
    _, tally = label_files.read_metadata(path, IMAGES)
    assert "not used" not in tally.line()


def test_metadata_without_a_known_column_is_refused(tmp_path):
    path = lines(tmp_path / "m.csv", "image_id,colour", "a,x")
    with pytest.raises(InputError, match="at least one of group, domain, slice"):
        label_files.read_metadata(path, IMAGES)


@pytest.mark.parametrize(
    ("rows", "line", "code"),
    [
        (["/m/1", "people & body"], 3, "people & body"),
        (["/m/1 "], 2, "/m/1 "),
        (["/m/1", "/m/2", "a\u00a0b"], 4, "a\u00a0b"),
        (["a\tb"], 2, "a\tb"),
        (["/m/1", "a\x07b"], 3, "a\x07b"),
        (["/m/1", "", "/m/2"], 3, ""),
        (['"a\nb"'], 2, "a\nb"),
    ],
)
def test_a_code_that_a_submission_cannot_hold_is_refused(tmp_path, rows, line, code):
    path = lines(tmp_path / "c.csv", "label_code", *rows)
    words = re.escape(f"c.csv line {line}: label_code {code!r} is empty or contains")
    with pytest.raises(InputError, match=words):
        label_files.read_codes(path, None)


GOOD = "a,v,/m/1,1"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD, "b,v,/m/1,0,9"], r"line 3: 5 cells, but the first line has 4 \('b,v,"),
        ([GOOD, GOOD, "b,v,/m/1,1,/m/2,1", GOOD], "line 4: 6 cells"),
        ([GOOD, "b,v,/m/1,1,"], "line 3: 5 cells"),
        (['a,"v\nv",/m/1,1', "", "b,v,/m/1,1,1"], "line 5: 5 cells"),
        ([GOOD, 'b,"v,/m/1,1', GOOD], "line 3: a double quote is not closed"),
        (['a,"v,/m/1,1', GOOD, 'b,"v",/m/1,1'], "line 2: a double quote is not closed"),
        (['a,v"v,/m/1,1', GOOD, 'b,v"v,/m/1,1'], "line 2: a double quote is not"),
        (['a,"v"v,/m/1,1', GOOD], "line 2: a double quote is not closed, or text"),
        ([GOOD, "b,v,/m/1"], "line 3: the row has no confidence; it must be a number"),
        ([GOOD, "", GOOD], "line 3: the row has no confidence"),
        (['a,"v\nv",/m/1,1', "b,v,/m/1,x"], "line 4: the confidence of label /m/1 of"),
    ],
)
def test_a_wrong_row_of_labels_is_refused_with_its_line(tmp_path, codes, rows, words):
    with pytest.raises(InputError, match=f"labels.csv {words}"):
        read(tmp_path, codes, *rows)


@pytest.mark.parametrize(
    ("header", "row", "read_file"),
    [
        ("label_code", "/m/1", lambda path: label_files.read_codes(path, None)),
        (
            "label_code,description",
            "/m/1,One",
            lambda path: label_files.read_codes(path, path),
        ),
        ("a,/m/1", "b,/m/1", lambda path: label_files.read_rows(path, header=False)),
        (
            "image_id,labels",
            "b,/m/1",
            lambda path: label_files.read_rows(path, header=True),
        ),
        ("image_id,group", "b,g", lambda path: label_files.read_metadata(path, IMAGES)),
        (
            "image_id",
            "b",
            lambda path: label_files.read_validation(path, IMAGES, IMAGES),
        ),
    ],
)
def test_a_wrong_row_of_any_file_is_refused_with_its_line(
    tmp_path, header, row, read_file
):
    read_file(lines(tmp_path / "f.csv", header, row))
    path = lines(tmp_path / "f.csv", header, row, f"{row},x")
    with pytest.raises(InputError, match=r"f.csv line 3: \d cells, but the first"):
        read_file(path)
    path = lines(tmp_path / "f.csv", header, row, f'"{row}')
    with pytest.raises(InputError, match=r"f.csv line 3: a double quote is not closed"):
        read_file(path)


def test_rows_with_quotes_or_fewer_cells_than_the_header_are_read(tmp_path, codes):
    quoted = '"a","1, ""2""\n3","/m/1","1"\r', 'b,v "or" w,/m/2,1\r', GOOD
    rows, tally = read(tmp_path, codes, *quoted, header=f"\ufeff{HEADER},XMin,XMax\r")
    assert rows == [(0, 1, 1.0), (1, 0, 1.0)]
    assert tally.read == 3


@pytest.mark.parametrize("num_bytes", [1, 8, 50])
def test_rows_are_checked_across_chunks(tmp_path, codes, monkeypatch, num_bytes):
    monkeypatch.setattr(csv_rows, "_CHUNK_BYTES", num_bytes)
    rows = [GOOD, 'b,"v,\n\nv,v,v,v\n",/m/1,1', GOOD]
    assert read(tmp_path, codes, *rows)[1].read == 3
    with pytest.raises(InputError, match="line 8: 5 cells"):
        read(tmp_path, codes, *rows, "c,v,/m/1,1,0")
    monkeypatch.setattr(csv_rows, "_MAX_LINES", 5)
    with pytest.raises(InputError, match="line 8: a double quote is not closed"):
        read(tmp_path, codes, *rows, 'c,"v,/m/1,1', *[GOOD] * 40)
