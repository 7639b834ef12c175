"""Tests facts that hold for every input on generated inputs."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import small_layout
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_pipeline import Source

from jaxii.data import index
from jaxii.data.image_decoding import orientation, read_exif
from jaxii.data.labels import (
    MACHINE,
    MACHINE_LABELS,
    Vocabulary,
    largest_by_key,
    resolve_labels,
    resolve_rows,
)
from jaxii.data.pipeline import LabelPolicy, ShardSpec, train_batches
from jaxii.data.transforms import TrainTransform, decoded_size
from jaxii.decoding import decoders
from jaxii.decoding.constant import best_constant
from jaxii.decoding.decoders import (
    expected_f2_decoder,
    threshold_decoder,
    top_k_decoder,
)
from jaxii.decoding.thresholds import DEFAULT_THRESHOLDS, choose, f2_by_threshold
from jaxii.evaluation.predictions import write_submission
from jaxii.objective.schedule import make_schedule, warmup_cosine
from jaxii.prepare import image_ids, label_files, shards
from jaxii.prepare.image_files import facts
from jaxii.prepare.label_files import Codes
from jaxii.prepare.tables.labelled import _codes
from jaxii.prepare.tables.notes import Notes
from jaxii.prepare.tables.table import read_table
from jaxii.train import stages
from jaxii.train.stages import Done, Enter, Saved, Stage, has_ended, next_action

settings.register_profile(
    "few",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("few")

CODES = ("a", "b", "c", "d")
WORDS = Codes(Vocabulary(CODES, CODES), frozenset({*CODES, "rare"}), "classes.csv")
# Characters that spreadsheets, people and programs write into cells, without zero bytes
# and control characters that Python and polars strip differently.
LETTERS = st.characters(
    codec="utf-8", exclude_characters="\0\x1c\x1d\x1e\x1f", exclude_categories=["Cs"]
)
PROBABILITIES = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.5, 1e-30, 1 - 2**-24])
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def written(rows, **options):
    """Returns rows as a CSV file."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n", **options).writerows(rows)
    return file.getvalue()


def matrix(rows, columns, elements):
    """Returns a strategy of lists of rows."""
    row = st.lists(elements, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows[0], max_size=rows[1])


# Label files and tables.


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["i0", "i1", " i2 ", "i3.jpg", "gone", ""]),
            st.sampled_from([*CODES, " a", "rare"]),
            st.sampled_from(["0", "1", "0.25", " 0.5", "1e-3"]),
        ),
        max_size=30,
    )
)
def test_a_label_file_gives_the_largest_confidence_of_each_image_and_label(
    folder, rows
):
    path, ids = folder / "labels.csv", pl.Series(["i0", "i1", "i2", "i3"])
    header = ("ImageID", "LabelName", "Confidence")
    path.write_text(written([header, *rows]))
    entries, tally = label_files.read_labels(path, WORDS, ids)
    expected = {}
    for image, code, confidence in rows:
        place = image.strip().removesuffix(".jpg"), code.strip()
        if place[0] in ids and place[1] in CODES:
            key = ids.to_list().index(place[0]), CODES.index(place[1])
            expected[key] = max(expected.get(key, 0.0), np.float32(confidence))
    found = zip(entries.rows.tolist(), entries.labels.tolist(), strict=True)
    assert dict(zip(found, entries.confidences, strict=True)) == expected
    assert tally.read == len(rows) == tally.kept + sum(tally.dropped.values())


@given(
    answers=st.dictionaries(
        st.text(LETTERS, min_size=1, max_size=8).map(str.strip).filter(bool),
        st.lists(st.sampled_from(range(4)), min_size=1, max_size=4, unique=True),
        min_size=1,
        max_size=6,
    )
)
def test_a_submission_is_read_back_as_it_was_written(folder, answers):
    path, ids = folder / "submission.csv", list(answers)
    labels = [np.array(chosen) for chosen in answers.values()]
    write_submission(path, ids, labels, WORDS.vocabulary, dict)
    entries, _, listed = label_files.read_image_labels(
        path, WORDS, pl.Series(ids), header=True
    )
    assert listed.to_list() == ids
    found = [[] for _ in ids]
    for row, label in zip(entries.rows, entries.labels, strict=True):
        found[row].append(int(label))
    assert found == [sorted(chosen) for chosen in answers.values()]


@given(
    codes=st.lists(st.text(LETTERS, max_size=6), min_size=1, max_size=6, unique=True),
    data=st.data(),
)
def test_a_vocabulary_is_read_back_as_it_was_saved(folder, codes, data):
    names = [data.draw(st.text(LETTERS, max_size=6)) for _ in codes]
    vocabulary = Vocabulary(tuple(codes), tuple(names))
    vocabulary.save(folder / "vocabulary.csv")
    assert Vocabulary.load(folder / "vocabulary.csv") == vocabulary


@given(
    # Python writes a carriage return in a cell without quotes.
    rows=matrix((1, 5), 3, st.text(LETTERS.filter("\r".__ne__), max_size=6)),
    separator=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_table_is_read_as_it_was_written_by_whatever_program(
    folder, rows, separator, end, encoding, quoting
):
    header = ["path", "label", "note"]
    text = written([header, *rows], delimiter=separator, quoting=quoting)
    # A program with other line ends also uses them within cells.
    (folder / "table.csv").write_bytes(text.replace("\n", end).encode(encoding))
    rows = [[cell.strip() for cell in row] for row in rows]
    expected = [tuple(row) for row in rows if any(row)]
    assume(expected)
    table = read_table(folder / "table.csv", Notes())
    assert table.columns == header
    assert table.rows() == expected


@given(st.lists(st.text(LETTERS, min_size=1, max_size=5), unique=True, max_size=8))
def test_every_label_gets_a_code_of_its_own_that_a_submission_can_hold(labels):
    codes = _codes(labels)
    assert len(set(codes)) == len(codes) == len(labels)
    assert all(code and len(code.split()) == 1 for code in codes)


# Ids.

SUFFIXES = st.sampled_from(["", ".jpg", ".JPG", ".jpeg", ".png", ".webp", ".gif", "."])
STEMS = st.sampled_from(["a", "A", "007", "7", "a.jpg", "é", "e\u0301", "", "x y"])
SPACES = st.sampled_from(["", " ", "\t", "\u00a0", "\n"])


@given(
    ids=st.lists(st.builds(str.__add__, STEMS, SUFFIXES), unique=True, max_size=6),
    names=st.lists(
        st.tuples(SPACES, STEMS, SPACES, SUFFIXES, SPACES).map("".join), max_size=8
    ),
)
def test_many_names_mean_what_each_of_them_means_alone(ids, names):
    ids = [name for name in ids if name]
    rows, num_suffixed = image_ids.find_rows(
        pl.Series(names, dtype=pl.String), pl.Series(ids, dtype=pl.String)
    )
    meant = [image_ids.meant(name, ids) for name in names]
    assert rows.to_list() == [ids.index(m) if m in ids else None for m in meant]
    found = zip(names, meant, strict=True)
    assert num_suffixed == sum(m in ids and m != n.strip() for n, m in found)


# Labels of images.

ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]),
        st.integers(0, 2),
    ),
    max_size=25,
).map(sorted)


def columns_of(entries, num_rows=4):
    rows = np.array([e[0] for e in entries], np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    types = np.int32, np.float32, np.uint8
    return offsets.astype(np.int64), *(
        np.array([e[i] for e in entries], t) for i, t in enumerate(types, start=1)
    )


@given(
    entries=ENTRIES,
    machine_labels=st.sampled_from(MACHINE_LABELS),
    threshold=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
)
def test_many_images_resolve_as_each_does_alone(entries, machine_labels, threshold):
    offsets, *columns = columns_of(entries)
    how = {"machine_labels": machine_labels, "machine_threshold": threshold}
    starts, ids, confidences = resolve_rows(offsets, *columns, **how)
    for row in range(4):
        own = slice(offsets[row], offsets[row + 1])
        alone = resolve_labels(*(column[own] for column in columns), **how)
        part = slice(starts[row], starts[row + 1])
        np.testing.assert_array_equal(ids[part], alone[0])
        np.testing.assert_array_equal(confidences[part], alone[1])
        people = {e[1] for e in entries if e[0] == row and e[3] != MACHINE}
        assert people <= set(alone[0].tolist())


@given(entries=ENTRIES, rows=st.lists(st.integers(0, 3), max_size=6))
def test_selected_rows_of_an_index_keep_their_entries(entries, rows):
    offsets, label_ids, confidences, sources = columns_of(entries)
    names = np.array(["p", "q", "r", "s"], object)
    whole = index.Index(
        *(names, names, names, np.arange(4, dtype=np.int32)),
        *(offsets, label_ids, confidences, sources),
    )
    chosen = whole.select(np.array(rows, np.int64))
    assert chosen.image_ids.tolist() == [names[row] for row in rows]
    for place, row in enumerate(rows):
        for name in ("label_ids", "confidences", "label_sources"):
            got = getattr(chosen, name)[slice(*chosen.offsets[place : place + 2])]
            want = getattr(whole, name)[slice(*offsets[row : row + 2])]
            np.testing.assert_array_equal(got, want)


@given(st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 1, width=32)), max_size=20))
def test_the_largest_value_of_each_key_is_that_of_a_dictionary(pairs):
    keys, values = largest_by_key(
        np.array([key for key, _ in pairs], np.int64),
        np.array([value for _, value in pairs], np.float32),
    )
    largest = {}
    for key, value in pairs:
        largest[key] = max(value, largest.get(key, value))
    assert list(zip(keys, values, strict=True)) == sorted(largest.items())


# Decoders and thresholds.


def f2(chosen, present):
    """Returns the F2 of one image by its definition."""
    hits = sum(c and p for c, p in zip(chosen, present, strict=True))
    total = 4 * sum(present) + sum(chosen)
    return 5 * hits / total if total else 0.0


@given(scores=matrix((1, 4), 5, PROBABILITIES | st.just(math.nan)), k=st.integers(1, 7))
def test_the_top_k_are_the_first_of_a_sort_by_score_and_id(scores, k):
    chosen = top_k_decoder(np.array(scores, np.float32), k=k)
    for row, got in zip(scores, chosen, strict=True):
        values = [-math.inf if math.isnan(x) else x for x in row]
        order = sorted(range(5), key=lambda i: (-values[i], i))
        assert np.flatnonzero(got).tolist() == sorted(order[:k])


@given(matrix((1, 3), 5, PROBABILITIES))
def test_no_set_of_labels_has_a_larger_expected_f2_than_the_chosen_one(probs):
    chosen = expected_f2_decoder(np.array(probs))
    sets = [[bool(number >> i & 1) for i in range(5)] for number in range(32)]
    for row, got in zip(probs, chosen, strict=True):
        chances = [
            math.prod(p if y else 1 - p for p, y in zip(row, truth, strict=True))
            for truth in sets
        ]
        worth = [
            sum(c * f2(a, truth) for c, truth in zip(chances, sets, strict=True))
            for a in (*sets[1:], got.tolist())
        ]
        assert got.any()
        assert worth[-1] >= max(worth) - 1e-12


SPLITS = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        matrix((n, n), 4, PROBABILITIES), matrix((n, n), 4, st.booleans())
    )
)


@settings(max_examples=25)
@given(SPLITS)
def test_the_choice_is_that_of_a_search_over_every_threshold_and_k(split):
    probs, targets = np.array(split[0], np.float32), np.array(split[1])
    assume(targets.any())
    acc = decoders.sums_of(probs, targets)
    scored = [i for i in range(len(probs)) if targets[i].any()]

    def mean(chosen):
        return sum(f2(chosen[i], targets[i]) for i in scored) / len(scored)

    by_threshold = [mean(probs >= np.float32(t)) for t in DEFAULT_THRESHOLDS]
    found = f2_by_threshold(acc) * float(acc.sums.num_images) / len(scored)
    np.testing.assert_allclose(found, by_threshold, rtol=0, atol=1e-6)
    choice = choose(acc)
    best = threshold_decoder(probs, threshold=choice.threshold)
    assert mean(best) >= max(by_threshold) - 1e-6
    by_k = [mean(top_k_decoder(probs, k=k)) for k in range(1, 5)]
    assert by_k[choice.top_k - 1] >= max(by_k) - 1e-6


@given(counts=st.lists(st.integers(0, 5), min_size=4, max_size=4), entries=ENTRIES)
def test_the_best_constant_is_the_best_prefix_of_the_frequent_labels(counts, entries):
    truth = [{e[1] for e in entries if e[0] == row and e[1] < 4} for row in range(4)]
    offsets = np.cumsum([0, *map(len, truth)])
    ids = np.array([label for row in truth for label in sorted(row)], np.int32)
    best, value = best_constant(np.array(counts), offsets, ids)
    order = sorted(range(4), key=lambda i: (-counts[i], i))
    present = [[label in row for label in range(4)] for row in truth]
    means = []
    for k in range(1, 5):
        chosen = [label in order[:k] for label in range(4)]
        means.append(sum(f2(chosen, row) for row in present) / 4)
    assert value == pytest.approx(max(means), abs=1e-12)
    assert best.tolist() == order[: len(best)]


# Schedules and stages.

PAIRS = st.lists(
    st.tuples(st.integers(0, 20).map(lambda n: n / 20), st.floats(0, 10, width=32)),
    min_size=1,
    max_size=5,
).map(lambda pairs: sorted(pairs, key=lambda pair: pair[0]))


@settings(max_examples=25)
@given(pairs=PAIRS, num_steps=st.integers(1, 1000), step=st.integers(0, 1200))
def test_a_schedule_is_the_line_between_its_pairs(pairs, num_steps, step):
    shares = [share for share, _ in pairs]
    assume(all(shares.count(share) <= 2 for share in shares))
    at = [(share * num_steps, value) for share, value in pairs]
    before = [pair for pair in at if pair[0] <= step + 1e-6]
    after = [pair for pair in at if pair[0] > step + 1e-6]
    if not before:
        want = at[0][1]
    elif not after:
        want = before[-1][1]
    else:
        (x, y), (x2, y2) = before[-1], after[0]
        want = y + (y2 - y) * (step - x) / (x2 - x)
    got = float(make_schedule(pairs, num_steps)(step))
    assert got == pytest.approx(want, rel=1e-5, abs=1e-5 * max(v for _, v in pairs))


@settings(max_examples=25)
@given(
    peak=st.floats(1e-6, 10), num_steps=st.integers(1, 500), share=st.floats(0, 0.999)
)
def test_a_learning_rate_rises_to_its_peak_and_falls_to_zero(peak, num_steps, share):
    warmup_steps = int(share * num_steps)
    rate = warmup_cosine(peak, warmup_steps, num_steps)
    steps = sorted({0, warmup_steps // 2, warmup_steps, num_steps - 1, num_steps})
    rates = [float(rate(step)) for step in steps]
    top = steps.index(warmup_steps)
    assert rates[top] == pytest.approx(peak, rel=1e-5) == max(rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0, abs=1e-6 * peak)


METRICS = st.sampled_from([0.0, 0.1, 0.1005, 0.2, 0.5, math.nan])


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    plateaus=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    metrics=st.lists(METRICS, min_size=20, max_size=20),
    kills=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    lengths, plateaus, metrics, kills
):
    plan = [
        Stage(name=str(i), terms={}, num_steps=n, plateau_evaluations=plateaus[i])
        for i, n in enumerate(lengths)
    ]
    whole = run(plan, metrics, [])
    assert run(plan, metrics, kills) == whole
    for stage in plan:
        steps = [s.step for s in whole[stage.name]]
        first = whole[stage.name][0].first_step
        assert steps == list(range(first + 1, first + 1 + len(steps)))
        ended = [
            has_ended(stage, s.step - first, s.evaluations) for s in whole[stage.name]
        ]
        assert ended == [False] * (len(ended) - 1) + [True]


def run(plan, metrics, kills):
    """Returns all checkpoints of a run that saves every second step and is killed.

    Each of `kills` is the number of steps of the next process; the rest finish.
    """
    saved, kept, kills = {}, {}, list(kills)
    for _ in range(1000):
        action = next_action(plan, kept)
        if isinstance(action, Done):
            return saved
        stage, start = action.stage, action.start
        entered = isinstance(action, Enter)
        first = action.step if entered else start.first_step
        step = action.step if entered else start.step
        evaluations = () if entered else start.evaluations
        for _ in range(kills.pop(0) if kills else 1000):
            step += 1
            metric = metrics[step % len(metrics)]
            evaluations = (*evaluations, (step, metric))
            ended = has_ended(stage, step - first, evaluations)
            now = Saved(
                stage=stage.name,
                step=step,
                first_step=first,
                metric=metric,
                evaluations=evaluations,
                finished=ended,
            )
            saved.setdefault(stage.name, {})[step] = now
            if ended or step % 2 == 0:
                kept.setdefault(stage.name, []).append(now)
            if ended:
                saved[stage.name] = [s for _, s in sorted(saved[stage.name].items())]
                break
        # Processes that never save would not finish.
        if kills and kills[0] == 1:
            kills[0] = 2
    raise AssertionError("the run does not end")


@given(st.lists(METRICS | st.none(), min_size=1, max_size=6))
def test_the_best_checkpoint_has_no_better_one_and_no_later_equal_one(metrics):
    saved = [
        Saved(stage="s", step=step, first_step=0, metric=metric)
        for step, metric in enumerate(metrics)
    ]
    best = stages.choose(saved[::-1], "best")
    for other in saved:
        if other.metric is None or math.isnan(other.metric):
            continue
        assert other.metric < best.metric or other.step <= best.step


# Images, shards and batches.


@given(st.binary(max_size=60), st.sampled_from([b"II*\0", b"MM\0*", b""]))
def test_whatever_is_called_exif_has_an_orientation(data, start):
    assert orientation(start + data) in range(1, 9)
    segment = b"\xff\xe1" + (len(data) + 8).to_bytes(2, "big") + b"Exif\0\0" + data
    assert read_exif(b"\xff\xd8" + segment, "jpeg") == data


SIDES = st.integers(1, 70_000)


@given(
    height=SIDES,
    width=SIDES,
    strength=st.floats(0, 2.5),
    seed=st.integers(0, 9),
)
def test_a_crop_lies_within_its_image(height, width, strength, seed):
    transform = TrainTransform(size_pixels=32, strength=strength)
    rng = np.random.default_rng(seed)
    top, left, rows, columns = transform._crop(height, width, rng)
    assert 0 <= top < top + rows <= height
    assert 0 <= left < left + columns <= width


@given(height=SIDES, width=SIDES, rows=SIDES, columns=SIDES)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(
    height, width, rows, columns
):
    sizes = [(-(-height // s), -(-width // s)) for s in (8, 4, 2, 1)]
    enough = [s for s in sizes if s[0] >= rows and s[1] >= columns]
    got = decoded_size(height, width, rows, columns)
    assert got == (enough[0] if enough else (height, width))


@given(st.integers(0, 5_000), st.integers(1, 40), st.integers(1, 20))
def test_shards_are_every_row_once_and_not_too_many(length, size, most):
    plan = shards.Plan("train", pl.DataFrame(), [Path("x")] * length, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_IMAGES", size)
        patch.setattr(shards, "MAX_SHARDS", most)
        found = plan.shards()
    assert [row for rows in found for row in rows] == list(range(length))
    assert len(found) <= most
    assert len({len(rows) for rows in found[:-1]}) <= 1


@settings(max_examples=10)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 5))
def test_shards_hold_every_readable_image_in_order(tmp_path_factory, readable, size):
    root = tmp_path_factory.mktemp("shards")
    paths = [root / f"{i:02d}.jpg" for i in range(len(readable))]
    for path, is_whole in zip(paths, readable, strict=True):
        encoded = small_layout.named(small_layout.jpeg(90), path.stem)
        path.write_bytes(encoded if is_whole else encoded[:-40])
    names = pl.Series([path.stem for path in paths])
    table = index.table(
        image_ids=names,
        groups=names,
        domains=names,
        slices=names,
        offsets=np.zeros(len(paths) + 1, np.int64),
        label_ids=np.zeros(0, np.int32),
        confidences=np.zeros(0, np.float32),
        label_sources=np.zeros(0, np.uint8),
    )
    plan = shards.Plan("train", table, paths, [facts(path) for path in paths])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_IMAGES", size)
        written = shards.write(root, plan, short_side=64)
        again = shards.write(root, plan, short_side=64)
    whole = [row for row, is_whole in enumerate(readable) if is_whole]
    assert written.rows.tolist() == whole
    assert sorted(written.faults) == [i for i in range(len(paths)) if i not in whole]
    assert sum(written.shard_lengths) == len(whole)
    assert again.files == written.files


@settings(max_examples=15)
@given(
    length=st.integers(1, 20),
    per_process=st.integers(1, 4),
    processes=st.integers(1, 4),
    first_step=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_the_batches_of_any_number_of_processes_are_those_of_one(
    length, per_process, processes, first_step, seed
):
    size = per_process * processes

    def ids(process, count):
        batches = train_batches(
            Source(length),
            transform=TrainTransform(size_pixels=8, strength=0.0),
            policy=LabelPolicy(num_slots=4),
            shard=ShardSpec(
                global_batch_size=size, process_index=process, process_count=count
            ),
            seed=seed,
            start_example=first_step * size,
        )
        return [next(batches)["index"].tolist() for _ in range(3)]

    whole = ids(0, 1)
    parts = [ids(process, processes) for process in range(processes)]
    joined = [[i for part in step for i in part] for step in zip(*parts, strict=True)]
    assert joined == whole
