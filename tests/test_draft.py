"""Tests partly saved rows: they are reused if they are intact and still match."""

import json

import pytest

from jaxii.errors import InputError
from jaxii.evaluation import draft

ROWS = [f"row {i}\n" for i in range(10)]


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def each_batch_is_saved(monkeypatch):
    monkeypatch.setattr(draft, "SAVE_SECONDS", 0.0)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers [1].csv"


def opened(output, identity="a", state=lambda: {"sum": 1.5}, num_rows=10):
    return draft.open_draft(
        output, identity, state=state, batch_size=4, num_rows=num_rows
    )


def stop_after(output, num_rows, **more):
    def rows():
        yield from ROWS[:num_rows]
        raise Stopped

    with pytest.raises(Stopped), opened(output, **more) as begun:
        begun.completed(rows())


def pieces(output):
    return sorted(path.name for path in output.parent.glob(".*.part/*"))


@pytest.mark.parametrize(
    ("num_rows", "kept"), [(3, 0), (4, 4), (7, 4), (8, 8), (9, 8), (10, 8)]
)
def test_rows_up_to_the_last_whole_batch_are_found_again(output, num_rows, kept):
    stop_after(output, num_rows)
    assert len(pieces(output)) == kept // 4
    with opened(output) as begun:
        assert begun.num_rows == kept
        assert begun.found == ({"sum": 1.5} if kept else {})
        assert "".join(begun.completed(ROWS[kept:])) == "".join(ROWS)
        begun.remove()
    assert list(output.parent.iterdir()) == []


def test_the_last_row_is_not_saved_because_nothing_would_be_left_to_predict(output):
    with opened(output, num_rows=8) as begun:
        begun.completed(ROWS[:8])
    assert pieces(output) == ["000000.json"]


def test_pieces_of_other_rows_are_removed(output):
    stop_after(output, 9)
    with opened(output, identity="b") as begun:
        assert (begun.num_rows, begun.found) == (0, {})
        assert pieces(output) == [".lock"]
    stop_after(output, 9, identity="")
    with opened(output, identity="") as begun:
        assert begun.num_rows == 0


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: b"", None])
def test_pieces_from_a_damaged_one_on_are_predicted_again(output, damage):
    stop_after(output, 9)
    first = output.with_name(f".{output.name}.part") / "000000.json"
    if damage is None:
        first.unlink()
    else:
        first.write_bytes(damage(first.read_bytes()))
    with opened(output) as begun:
        assert begun.num_rows == 0
        assert pieces(output) == [".lock"]
        assert "".join(begun.completed(ROWS)) == "".join(ROWS)


def test_rows_without_a_state_are_kept_with_the_next_that_have_one(output):
    states = iter([None, {"sum": 2}])
    stop_after(output, 9, state=lambda: next(states))
    with opened(output) as begun:
        assert (begun.num_rows, begun.found) == (8, {"sum": 2})
        assert "".join(begun.completed(ROWS[8:])) == "".join(ROWS)


def test_a_long_batch_is_saved_at_once(output, monkeypatch):
    monkeypatch.setattr(draft, "SAVE_SECONDS", 1e9)
    monkeypatch.setattr(draft, "MOST_CHARACTERS", len(ROWS[0]) * 6)
    stop_after(output, 9)
    with opened(output) as begun:
        assert begun.num_rows == 8
    assert json.loads(next(output.parent.glob("*/000000.json")).read_text())


def test_an_output_that_another_command_writes_is_refused(output):
    stop_after(output, 9)
    with opened(output):
        with pytest.raises(InputError, match="is in use by process"), opened(output):
            pass
        assert pieces(output) == [".lock", "000000.json", "000001.json"]
    with opened(output) as begun:
        assert begun.num_rows == 8


def test_files_that_a_killed_process_was_writing_are_removed(output):
    stale = output.with_name(f".{output.name}.0123abcd.part")
    other = output.with_name(".answers 1.csv.0123abcd.part")
    for path in (stale, other):
        path.touch()
    with opened(output):
        assert not stale.exists() and other.exists()
