"""Realistic labelled images: four layouts of label files, all with errors.

Each function writes `photos/` and, except for the last, `labels.csv`; it returns the
arguments that `jaxii new` needs for it. All have the same errors: see `DIRT`.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

# One encoded image and its labels.
Example = tuple[bytes, Sequence[str]]
STRANGE = ("<script>alert(1)</script>", "🚤boat", "قارب", "l'été")
# Messages that `jaxii new` has to print for layouts with a label file; see `_rows`.
DIRT = (
    r"3 broken images",
    r"2 names in the label file .2 rows. that match no image",
    r"2 images without a row in the label file",
    r"1 images without a label",
    r"1 sets of labels differ only in case.*(DOG|Dog)",
    r"the image id is the path below --images",
    r"other files are skipped: .*hidden.*",
)


def photos(root: Path, examples: Sequence[Example]) -> list[str]:
    """Writes images, with the same names in two folders; returns their paths."""
    names = []
    for i, (encoded, _) in enumerate(examples):
        name = f"{'été' if i % 2 else 'a'}/img{i // 2:04d}.jpg"
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(encoded)
        names.append(name)
    whole = examples[0][0]
    broken = {"cut.jpg": whole[: len(whole) // 2], "empty.jpg": b"", "page.png": b"<p>"}
    for name, content in broken.items():
        (root / "photos" / name).write_bytes(content)
    for name in ("unlisted1.jpg", "unlisted2.jpg", "unlabelled.jpg"):
        (root / "photos" / name).write_bytes(whole)
    (root / "photos" / "._img.jpg").write_bytes(b"Mac OS X")
    (root / "photos" / "Thumbs.db").write_bytes(b"\0")
    return names


def _rows(names: Sequence[str], examples: Sequence[Example]) -> list[tuple[str, list]]:
    """Returns path and labels of each row, including errors."""
    rows = [
        (name, [*labels, STRANGE[i % 40 // 10]] if i % 10 == 0 else list(labels))
        for i, (name, (_, labels)) in enumerate(zip(names, examples, strict=True))
    ]
    usual = examples[0][1][0]
    rows += [(name, [usual]) for name in ("cut.jpg", "empty.jpg", "page.png")]
    rows += [(name, [usual]) for name in ("gone/1.jpg", "gone/2.jpg")]
    rows.append(("unlabelled.jpg", []))
    # Listed twice, once in another case.
    rows += [rows[1], (rows[2][0], [*rows[2][1], "DOG"]), (rows[3][0], ["Dog"])]
    return rows


def row_a_label(root: Path, examples: Sequence[Example]) -> list[str]:
    """Excel in much of Europe: semicolons, byte order mark, CRLF, `file;label`."""
    rows = _rows(photos(root, examples), examples)
    lines = [["file", "label", "confidence", "group"]]
    for i, (name, labels) in enumerate(rows):
        group = f"g{i // 3}" if i < len(examples) else ""
        lines += [[name, f" {label} ", "1", group] for label in labels or [""]]
    text = _text(lines, separator=";").replace("\n", "\r\n")
    (root / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return _words(root)


def spaces(root: Path, examples: Sequence[Example]) -> list[str]:
    """Ids without a suffix, labels separated by spaces, a second column of paths."""
    rows = _rows(photos(root, examples), examples)
    lines = [["where", "image_id", "tags"]]
    lines += [[f"photos/{n}", Path(n).with_suffix(""), " ".join(ls)] for n, ls in rows]
    (root / "labels.csv").write_text(_text(lines))
    return _words(root)


def json_lists(root: Path, examples: Sequence[Example]) -> list[str]:
    """Absolute paths, JSON in a cell (or as Python writes it), a split column."""
    rows = _rows(photos(root, examples), examples)
    lines = [["path", "labels", "split"]]
    for i, (name, labels) in enumerate(rows):
        cell = repr(labels) if i % 7 == 0 else json.dumps(labels)
        split = ("test" if i % 10 == 7 else "val") if i % 10 in (7, 8) else "train"
        lines.append([root.absolute() / "photos" / name, cell, split])
    (root / "labels.csv").write_text(_text(lines))
    return _words(root)


def one_hot(root: Path, examples: Sequence[Example]) -> list[str]:
    """Tabs, paths relative to the label file's folder, one column per label."""
    rows = _rows(photos(root, examples), examples)
    names = sorted({label for _, labels in rows for label in labels})
    lines = [["filename", "width", *names]]
    for name, labels in rows:
        row = [str(int(label in labels)) for label in names]
        lines.append([f"photos\\{name}", "640", *row])
    (root / "labels.csv").write_text(_text(lines, separator="\t"))
    return _words(root)


def folders(root: Path, examples: Sequence[Example]) -> list[str]:
    """No label file: the folders are the labels."""
    for i, (encoded, labels) in enumerate(examples):
        folder = root / "photos" / labels[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(encoded)
    return [f"--images={root / 'photos'}"]


LAYOUTS: dict[str, Callable[[Path, Sequence[Example]], list[str]]] = {
    "row_a_label": row_a_label,
    "spaces": spaces,
    "json_lists": json_lists,
    "one_hot": one_hot,
    "folders": folders,
}


def _text(lines: Sequence[Sequence[object]], separator: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _words(root: Path) -> list[str]:
    return [f"--images={root / 'photos'}", f"--labels={root / 'labels.csv'}"]
