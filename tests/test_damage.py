"""Tests that a damaged file is named or makes no difference: a sample of `damage`.

The full check is a command that takes half an hour: `python -m tests.damage`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.damage import BAD, GOOD, Baseline, differences, judge, names
from tests.damaged_copies import (
    COMMANDS,
    DATA,
    RUN,
    STOPPED,
    Case,
    damage_bytes,
    kind_of,
    like_of,
)
from tests.forked import STDERR, STDOUT, Ended

ROOT = Path(__file__).parent.parent
NO_RESUME = [name for name in COMMANDS if name != "resume"]
SHARD = f"{DATA}/shard.array_record-00000-of-00001"


# The sample.


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes of (file, damage, command) of a sample, and of the undamaged copies."""
    found = tmp_path_factory.mktemp("damage") / "cases.json"
    words = (
        f"--only={RUN}/config.json,{RUN}/metrics.json,{DATA}/index-test,"
        f"{DATA}/dataset_info.json,{DATA}/manifest.json,labelled_images-test",
        "--damage=deleted,emptied,replaced",
        f"--command={','.join(NO_RESUME)}",
        f"--json={found}",
    )
    result = subprocess.run(
        [sys.executable, "-m", "tests.damage", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.exists(), result.stdout + result.stderr
    cases = json.loads(found.read_text())["cases"]
    outcomes = {(c["file"], c["damage"], c["command"]): c["outcome"] for c in cases}
    bad = [case for case in cases if case["outcome"] in BAD]
    assert result.returncode == bool(bad)
    assert not bad, result.stdout
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("command", NO_RESUME)
def test_an_undamaged_copy_gives_the_same_results_again(outcomes, command):
    assert outcomes["", "none", command] == "harmless"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "compare"])
@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_a_run_without_a_whole_configuration_is_refused(outcomes, damage, command):
    assert outcomes["config.json", damage, command] == "detected"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_an_empty_index_is_refused_by_what_reads_the_data(outcomes, command):
    assert outcomes["index-test.parquet", "emptied", command] == "detected"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
@pytest.mark.parametrize(
    "file",
    [
        "manifest.json",
        "index-test.parquet",
        "labelled_images-test.array_record-00000-of-00001",
    ],
)
def test_a_file_of_another_dataset_is_refused(outcomes, file, command):
    assert outcomes[file, "replaced", command] == "detected"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "export", "compare"])
@pytest.mark.parametrize("damage", ["deleted", "emptied", "replaced"])
def test_figures_that_are_not_the_runs_are_refused(outcomes, damage, command):
    assert outcomes["metrics.json", damage, command] == "detected"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "compare"])
def test_what_needs_no_data_does_not_miss_it(outcomes, command):
    assert outcomes["index-test.parquet", "deleted", command] == "harmless"
    assert outcomes["index-test.parquet", "emptied", command] == "unread"


# The harness.


def test_flipped_bytes_are_64_spread_over_the_file_or_all():
    content = bytes(6400)
    flipped = damage_bytes(content, "flipped", None)
    places = [i for i, byte in enumerate(flipped) if byte]
    assert places == list(range(50, 6400, 100))
    assert all(
        damage_bytes(b"0123456789", "flipped", None)[i] != i + 48 for i in range(10)
    )
    assert damage_bytes(b"", "flipped", None) == b""


def test_what_else_damage_leaves():
    content = b'{"step": 12}'
    assert damage_bytes(content, "deleted", None) is None
    assert damage_bytes(content, "emptied", None) == b""
    assert damage_bytes(content, "truncated", None) == content[:6]
    assert damage_bytes(content, "replaced", b"other") == b"other"
    assert damage_bytes(content, "altered", None) == b'{"step": 02}'
    assert damage_bytes(b"\0a1", "altered", None) == b"\0a1"


def test_files_of_one_kind_differ_in_stage_step_split_and_random_name():
    name = "checkpoints/f2/12/model/d/0123456789abcdef0123456789abcdef"
    assert kind_of(name) == "checkpoints/*/*/model/d/*"
    assert kind_of("index-test.parquet") == kind_of("index-train.parquet")
    assert kind_of("metrics.json") == "metrics.json"


def test_a_file_with_a_random_name_is_replaced_by_that_of_its_rank_by_size(tmp_path):
    for root, name, contents in (("one", "0", "a bb"), ("other", "f", "ccc d")):
        folder = tmp_path / root / "checkpoints" / "f2" / "4" / "model" / "d"
        folder.mkdir(parents=True)
        for i, content in enumerate(contents.split()):
            (folder / (name * 31 + str(i))).write_text(content)
    file = f"checkpoints/f2/4/model/d/{'0' * 31}1"
    assert like_of(tmp_path / "one", file, tmp_path / "other") == b"ccc"
    (tmp_path / "one" / "alone").write_text("here")
    assert like_of(tmp_path / "one", "alone", tmp_path / "other") is None


def test_labels_are_replaced_by_themselves_in_another_order(tmp_path):
    (tmp_path / "labels.csv").write_text("label_code\na\nb\n")
    found = like_of(tmp_path, "labels.csv", tmp_path)
    assert found == b"label_code\nb\na\n"


@pytest.mark.parametrize(
    ("line", "place", "named"),
    [
        (f"jaxii: {RUN}/metrics.json is no JSON", f"{RUN}/metrics.json", True),
        (f"jaxii: /a/b/{RUN}/metrics.json: no", f"{RUN}/metrics.json", True),
        ("jaxii: metrics.json is no JSON", f"{RUN}/metrics.json", True),
        (f"jaxii: {RUN} is not the folder of a run", f"{RUN}/metrics.json", True),
        (f"jaxii: {RUN}/config.json is no JSON", f"{RUN}/metrics.json", False),
        (f"jaxii: {DATA}/labels.csv is empty", f"{RUN}/labels.csv", False),
        ("jaxii: the data has other labels", f"{DATA}/labels.csv", False),
        (f"jaxii: {RUN}/metrics.json.", f"{RUN}/metrics.json", True),
        (f"jaxii: {RUN}/a/4 lacks a part", f"{RUN}/a/4/model/d/x", True),
        (f"jaxii: {RUN}/a/40 lacks a part", f"{RUN}/a/4/model/d/x", False),
        (f"jaxii: {RUN}/a/4/training is damaged", f"{RUN}/a/4/model/d/x", False),
        ("jaxii: the metadata is damaged", f"{RUN}/a/4/metadata/metadata", False),
    ],
)
def test_a_message_names_a_file_or_the_folder_that_it_is_in(line, place, named):
    assert names(line, place) is named


def test_results_differ_where_a_number_does():
    before = {"splits": {"test": {"f2": 0.5, "map": float("nan")}}, "step": 8}
    assert differences(before, json.loads(json.dumps(before))) == []
    now = {"splits": {"test": {"f2": 0.25, "map": float("nan")}}, "step": 8, "more": 1}
    assert differences(before, now) == [
        "more: absent -> 1",
        "splits.test.f2: 0.5 -> 0.25",
    ]


class OneFile:
    """Stands in for `Built`: one file after the damage."""

    def __init__(self, left):
        self.left = left

    def damaged(self, case):
        return self.left


@pytest.mark.parametrize(
    ("code", "errors", "table", "outcome"),
    [
        (0, "", "table", "harmless"),
        (0, "a warning", "table", "harmless"),
        (0, "", "other", "changed"),
        (2, f"jaxii: {RUN}/metrics.json is damaged", "", "detected"),
        (2, f"a warning\njaxii: {RUN}/metrics.json is damaged", "", "unclear"),
        (2, "jaxii: something is damaged", "", "unclear"),
        (1, f"jaxii: {RUN}/metrics.json is damaged", "", "wrong exit"),
        (1, "Traceback (most recent call last):\nKeyError: 'f2'", "", "traceback"),
        (-11, "", "", "wrong exit"),
        (-14, "", "", "hang"),
    ],
)
def test_an_outcome_is_told_from_code_stderr_and_results(
    tmp_path, code, errors, table, outcome
):
    (tmp_path / RUN).mkdir()
    (tmp_path / RUN / "metrics.json").write_bytes(b"damaged")
    (tmp_path / STDERR).write_text(errors)
    (tmp_path / STDOUT).write_text(table)
    case = Case(RUN, "metrics.json", "flipped", "compare")
    base = Baseline({STDOUT: b"table"})
    ended = Ended(code=code, cpu_seconds=1.0, wall_seconds=1.0)
    verdict = judge(case, tmp_path, ended, OneFile(b"damaged"), base)
    assert verdict.outcome == outcome
    if outcome == "harmless":
        again = judge(case, tmp_path, ended, OneFile(b"damage"), base)
        assert again.outcome == "repaired"


def test_only_what_a_command_opens_or_may_miss_is_run():
    base = Baseline(opened=frozenset({f"{RUN}/config.json", f"{RUN}/a/d"}))

    def reads(file, damage):
        return base.reads(Case(STOPPED, file, damage, "resume"))

    random = "a/d/" + "0" * 32
    assert reads("config.json", "flipped")
    assert not reads("report.html", "flipped")
    assert reads("report.html", "deleted")
    assert reads(random, "deleted")
    assert not reads("b/d/" + "0" * 32, "deleted")
    # If no opened file was observed, every case is run.
    assert Baseline().reads(Case(RUN, "report.html", "flipped", "train"))


CHILDREN = """
import sys, threading, time
from pathlib import Path
from tests import forked

def reads():
    Path("sub/read").read_text()
    print("said")
    return 7

def waits():
    time.sleep(60)

def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(60,)).start()
    return 0

def raises():
    raise KeyError("f2")

root = Path(sys.argv[1])
jobs = []
for act in (reads, waits, leaves_a_thread, raises):
    folder = root / act.__name__
    (folder / "sub").mkdir(parents=True)
    for name in ("read", "unread"):
        (folder / "sub" / name).write_text(name)
    jobs.append((act.__name__, act, lambda folder=folder: folder))
watch = forked.Watch(root / "reads")
ends = {name: end for name, _, end in forked.run_all(jobs, at_once=4, most_seconds=2)}
assert ends["reads"].code == 7, ends
assert ends["waits"].hung and ends["leaves_a_thread"].hung, ends
assert ends["raises"].code == 1, ends
assert "KeyError: 'f2'" in forked.said(root / "raises")
assert "in waits" in forked.said(root / "waits")
assert (root / "reads" / forked.STDOUT).read_text() == "said\\n"
opened = watch.opened()
assert "sub/read" in opened and "sub/unread" not in opened, opened
"""


def test_children_end_with_their_code_and_a_hang_is_ended(tmp_path):
    words = [sys.executable, "-c", CHILDREN, str(tmp_path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_outcome_is_good_or_bad():
    assert not set(GOOD) & set(BAD)
