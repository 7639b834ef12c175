"""Tests which stage runs next for any state on disk, without JAX and files."""

import pytest

from jaxii.train.stages import (
    ENTERS_FROM,
    BatchSize,
    Done,
    Enter,
    Resume,
    Saved,
    Stage,
    batches_in_words,
    choose,
    has_ended,
    next_action,
)

FIRST = Stage(name="first", terms={"bce": 1.0}, num_steps=100, embedding_head=True)
SECOND = Stage(name="second", terms={"bce": 1.0}, num_steps=50, enters_from="last")
THIRD = Stage(name="third", terms={"bce": 1.0}, num_steps=50)
STAGES = (FIRST, SECOND, THIRD)


def saved(stage, step, metric=None, finished=False, first_step=0):
    return Saved(
        stage=stage,
        step=step,
        first_step=first_step,
        metric=metric,
        finished=finished,
    )


BEST = saved("first", 60, 0.5)
HALF = saved("first", 80, 0.4)
END = saved("first", 100, 0.3, finished=True)
LONGER = saved("first", 110, 0.3)
SECOND_HALF = saved("second", 130, 0.6, first_step=100)
SECOND_END = saved("second", 150, 0.6, finished=True, first_step=100)
THIRD_END = saved("third", 200, 0.7, finished=True, first_step=150)


@pytest.mark.parametrize(
    ("on_disk", "action"),
    [
        ({}, Enter(FIRST, None, 0)),
        ({"first": []}, Enter(FIRST, None, 0)),
        ({"first": [HALF, BEST]}, Resume(FIRST, HALF)),
        ({"first": [BEST, END]}, Enter(SECOND, END, 100)),
        # Extended after it had ended.
        ({"first": [END, LONGER]}, Resume(FIRST, LONGER)),
        ({"first": [BEST, END], "second": [SECOND_HALF]}, Resume(SECOND, SECOND_HALF)),
        ({"first": [END], "second": [SECOND_END]}, Enter(THIRD, SECOND_END, 150)),
        (
            {"first": [END], "second": [SECOND_END], "third": [THIRD_END]},
            Done(THIRD_END),
        ),
    ],
)
def test_what_is_on_disk_decides_the_action(on_disk, action):
    assert next_action(STAGES, on_disk) == action


def test_a_stage_that_enters_from_best_starts_at_the_end_of_the_one_before():
    stages = (FIRST, Stage(name="second", terms={"bce": 1.0}, num_steps=50))
    action = next_action(stages, {"first": [BEST, END]})
    assert action == Enter(stages[1], BEST, 100)


def test_a_stage_starts_at_the_example_where_the_one_before_ended():
    best = Saved(stage="first", step=60, first_step=0, example=480, metric=0.5)
    end = Saved(stage="first", step=100, first_step=0, example=800, finished=True)
    action = next_action((FIRST, THIRD), {"first": [best, end]})
    assert action == Enter(THIRD, best, 100, 800)


def test_the_best_is_the_highest_metric_the_latest_of_equals_and_not_the_last():
    later = saved("first", 90, 0.5)
    assert choose([BEST, HALF, END], "best") == BEST
    assert choose([BEST, END, HALF], "last") == END
    assert choose([BEST, later, END], "best") == later


def test_each_way_to_enter_is_known_and_the_first_is_the_default():
    assert [choose([BEST, END], which) for which in ENTERS_FROM] == [BEST, END]
    assert FIRST.enters_from == ENTERS_FROM[0]


def test_what_a_stage_does_not_say_is_the_plain_case():
    assert (FIRST.split, FIRST.trainable) == ("train", "all")
    assert (THIRD.embedding_head, FIRST.peak_lr_scale, FIRST.warmup_share) == (
        False,
        1,
        0.05,
    )


def test_a_stage_that_begins_has_used_nothing_and_has_not_ended():
    new = Saved(stage="first", step=5, first_step=5)
    assert (new.example, new.first_example, new.evaluations) == (0, 0, ())
    assert (new.metric, new.finished) == (None, False)


def test_the_best_of_checkpoints_without_a_metric_is_the_last():
    assert choose([saved("first", 1), saved("first", 2)], "best").step == 2


def test_a_metric_that_is_nan_is_no_measurement():
    broken = saved("first", 1, metric=float("nan"))
    assert choose([broken, HALF], "best") == HALF
    assert choose([HALF, broken], "best") == HALF


def test_a_stage_ends_after_its_steps():
    assert not has_ended(FIRST, 99, [])
    assert has_ended(FIRST, 100, [])


def test_a_stage_without_a_plateau_goes_on_whatever_its_metric():
    assert not has_ended(FIRST, 99, [(step, 0.5) for step in range(99)])


def test_a_rise_of_exactly_the_least_is_no_plateau():
    stage = Stage(
        name="s",
        terms={"bce": 1.0},
        num_steps=1000,
        plateau_evaluations=1,
        plateau_min_delta=0.25,
    )
    assert not has_ended(stage, 20, [(10, 0.5), (20, 0.75)])
    assert has_ended(stage, 20, [(10, 0.5), (20, 0.7499)])


@pytest.mark.parametrize(
    ("metrics", "ended"),
    [
        ([0.1, 0.2], False),
        ([0.3, 0.3, 0.3], True),
        ([0.3, 0.2, 0.31], False),
        ([0.3, 0.2, 0.3005], True),
        ([0.1, 0.2, 0.3], False),
        ([0.1, 0.3, 0.1], False),
        ([0.1, 0.2, 0.3, 0.25, 0.25], True),
    ],
)
def test_a_stage_ends_on_a_plateau(metrics, ended):
    stage = Stage(name="s", terms={"bce": 1.0}, num_steps=1000, plateau_evaluations=2)
    evaluations = [(10 * i, metric) for i, metric in enumerate(metrics)]
    assert has_ended(stage, 30, evaluations) is ended


@pytest.mark.parametrize(("in_epochs", "done"), [(False, 7), (True, 12)])
def test_a_stage_in_epochs_counts_its_updates_by_examples(in_epochs, done):
    stage = Stage(name="first", terms={}, num_steps=15, in_epochs=in_epochs)
    # 5 updates of 8 examples, then 2 of 4.
    half = Saved(stage="first", step=17, first_step=10, example=148, first_example=100)
    assert stage.steps_done(half, global_batch_size=4) == done


def test_batch_sizes_are_told_in_order():
    sizes = BatchSize(0, 64, 1), BatchSize(500, 64, 2), BatchSize(900, 32, 1)
    assert batches_in_words(sizes) == (
        "64 images, then 64 images in 2 micro-batches after step 500, "
        "then 32 images after step 900"
    )
