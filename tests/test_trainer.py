"""Tests the trainer: stages in order, ends, resuming, leaving, and the guard."""

import errno
import io
import itertools
import os
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from small_runs import metadata_of

from jaxii.distributed.mesh import make_mesh, replicated
from jaxii.errors import InputError
from jaxii.objective.objective import make_objective
from jaxii.train.averaging import ema_rate, swa_rate
from jaxii.train.checkpoint import Checkpoints, FailedSave, evaluated_params
from jaxii.train.initial_weights import (
    FRESH,
    CheckpointWeights,
    PretrainedWeights,
    inherit,
)
from jaxii.train.optimizer import make_optimizer
from jaxii.train.stages import Saved, Stage
from jaxii.train.step import StepSettings, make_train_step
from jaxii.train.telemetry.history import read_history
from jaxii.train.telemetry.profiling import Profiler
from jaxii.train.telemetry.telemetry import Telemetry
from jaxii.train.trainer import Diverged, Preempted, StagePlan, Trainer

RATES = {
    "none": lambda num_steps: None,
    "ema": lambda num_steps: ema_rate(0.9),
    "swa": lambda num_steps: swa_rate(num_steps, 0.5),
}
NUM_CLASSES, BATCH, FEATURES = 3, 8, 24
METRIC = "held_out/f2"


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: jax.Array | None


def apply(params, batch_stats, images, *, train, key):
    features = jnp.tanh(images.astype(jnp.float32).reshape(images.shape[0], -1) / 99.0)
    embedding = features @ params["embedding"] if "embedding" in params else None
    return Outputs(features @ params["classifier"], embedding), batch_stats


def init(key, *, head):
    params = {"classifier": jax.random.normal(key, (FEATURES, NUM_CLASSES))}
    if head:
        params["embedding"] = jax.random.normal(key, (FEATURES, 2))
    return params, {"mean": jnp.zeros(2)}


def batches(split, start):
    step = start // BATCH + (1000 if split == "tuning" else 0)
    while True:
        rng = np.random.default_rng(step)
        yield {
            "images": rng.integers(0, 255, (BATCH, 2, 4, 3)).astype(np.uint8),
            "label_ids": rng.integers(0, NUM_CLASSES, (BATCH, 1)).astype(np.int32),
            "label_confidences": np.ones((BATCH, 1), np.float32),
            "mask": np.ones(BATCH, np.float32),
        }
        step += 1


PLANS, STEPS = {}, {}


def plan(*given):
    """Returns a plan, cached by the arguments of `make_plan`."""
    if repr(given) not in PLANS:
        PLANS[repr(given)] = make_plan(*given)
    return PLANS[repr(given)]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Compiles the train step of a plan once for all runs of this file."""

    def make(settings, mesh):
        if id(settings) not in STEPS:
            STEPS[id(settings)] = make_train_step(settings, mesh)
        return STEPS[id(settings)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxii.train.trainer.make_train_step", make)
        yield


def make_plan(stage, rate=0.1, average="ema", shard_state=False):
    def schedule(step):
        return jnp.float32(rate)

    terms = dict(stage.terms)
    return StagePlan(
        stage=stage,
        settings=StepSettings(
            apply=apply,
            objective=make_objective(
                terms, num_steps=stage.num_steps, num_classes=NUM_CLASSES
            ),
            optimizer=make_optimizer(
                name="sgd", schedule=optax.constant_schedule(rate), weight_decay=0.0
            ),
            learning_rate=schedule,
            average_rate=RATES[average](stage.num_steps),
            shard_state=shard_state,
        ),
        init=lambda key: init(key, head=stage.embedding_head),
    )


STAGES = (
    Stage(
        name="both",
        terms={"bce": 1.0, "embedding": 1.0},
        num_steps=6,
        embedding_head=True,
        enters_from="last",
    ),
    Stage(name="one", terms={"bce": 1.0}, num_steps=4, enters_from="last"),
)


def statistics(plan, state):
    """Stands in for re-estimating BatchNorm: a value that depends on the average."""
    largest = jnp.max(jnp.abs(state.params_to_evaluate()["classifier"]))
    return {"mean": jnp.full(2, largest)}


class Folder:
    """A workdir whose runs can be started as often as a test needs."""

    def __init__(self, path):
        self.path = path

    def run(
        self,
        stages=STAGES,
        *,
        leave_after=None,
        metric=None,
        rate=0.1,
        shard_state=False,
        **more,
    ):
        checkpoints = Checkpoints(
            self.path, [stage.name for stage in stages], "0123456789abcdef"
        )
        asked = {"times": 0}

        def should_stop(step):
            asked["times"] += 1
            return asked["times"] == leave_after

        steps = [s.step for found in checkpoints.saved().values() for s in found]
        self.output = io.StringIO()
        telemetry = Telemetry(
            self.path,
            total_steps=10,
            start_step=max(steps, default=0),
            stream=self.output,
        )
        trainer = Trainer(
            plans=tuple(
                plan(stage, rate, more.get("average", "ema"), shard_state)
                for stage in stages
            ),
            mesh=make_mesh(),
            checkpoints=checkpoints,
            batches=more.get("batches", batches),
            batch_stats=more.get("statistics", lambda plan, state: state.batch_stats),
            telemetry=telemetry,
            evaluate=metric or (lambda settings, params, stats: {METRIC: 0.5}),
            metric=METRIC,
            label_embeddings=jax.device_put(
                jnp.eye(NUM_CLASSES, 2), replicated(make_mesh())
            ),
            initial_weights=more.get("start", FRESH),
            metadata=metadata_of,
            global_batch_size=more.get("batch", BATCH),
            evaluate_every_steps=more.get("evaluate_every_steps", 2),
            log_every_steps=1,
            most_skipped_steps=3,
            continue_after_failed_save=more.get("continue_after_failed_save", False),
            seed=0,
            should_stop=should_stop,
            profiler=more.get("profiler", Profiler()),
        )
        try:
            with telemetry:
                return trainer.run()
        finally:
            checkpoints.close()

    def model(self, stage):
        checkpoints = Checkpoints(
            self.path, [s.name for s in STAGES], "0123456789abcdef"
        )
        last = checkpoints.saved()[stage][-1]
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        model = checkpoints.restore_model(last, sharding)
        checkpoints.close()
        return last, model


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A whole run without interruption; read only."""
    folder = Folder(tmp_path_factory.mktemp("undisturbed"))
    folder.last = folder.run()
    return folder


def test_stages_run_in_order_and_the_head_is_dropped(undisturbed):
    last = undisturbed.last
    assert (last.stage, last.first_step, last.step, last.finished) == (
        "one",
        6,
        10,
        True,
    )
    assert set(undisturbed.model("both")[1]["params"]) == {"classifier", "embedding"}
    assert set(undisturbed.model("one")[1]["params"]) == {"classifier"}


@pytest.mark.parametrize("leave_after", [1, 3, 6, 7, 9])
def test_left_at_any_step_and_resumed_it_is_the_same_run_bit_for_bit(
    folder, undisturbed, leave_after
):
    try:
        folder.run(leave_after=leave_after)
    except Preempted:
        folder.run()
    for stage in ("both", "one"):
        last, model = folder.model(stage)
        other_last, other = undisturbed.model(stage)
        assert last.step == other_last.step
        assert last.evaluations == other_last.evaluations
        jax.tree.map(np.testing.assert_array_equal, model, other)
    rows = read_history(folder.path / "history.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_a_state_of_another_structure_cannot_be_resumed_and_says_so(folder):
    with pytest.raises(Preempted):
        folder.run(leave_after=3)
    with pytest.raises(InputError, match="step 3 of stage both cannot be resumed"):
        folder.run(average="none")


SWA = {"average": "swa", "statistics": statistics}


@pytest.fixture(scope="module")
def undisturbed_swa(tmp_path_factory):
    folder = Folder(tmp_path_factory.mktemp("undisturbed_swa"))
    folder.run(**SWA)
    return folder


@pytest.mark.parametrize("leave_after", [5, 9])
def test_swa_with_statistics_of_its_own_is_the_same_run_when_left_and_resumed(
    folder, undisturbed_swa, leave_after
):
    with pytest.raises(Preempted):
        folder.run(leave_after=leave_after, **SWA)
    folder.run(**SWA)
    for stage in ("both", "one"):
        last, model = folder.model(stage)
        other_last, other = undisturbed_swa.model(stage)
        assert last == other_last
        jax.tree.map(np.testing.assert_array_equal, model, other)


def figure(params, batch_stats):
    total = sum(float(np.sum(np.asarray(leaf))) for leaf in jax.tree.leaves(params))
    return total + float(batch_stats["mean"][0])


@pytest.mark.parametrize("average", ["none", "swa"])
def test_a_checkpoint_holds_the_evaluation_of_the_very_model_beside_it(folder, average):
    folder.run(
        average=average,
        statistics=statistics,
        metric=lambda settings, params, stats: {METRIC: figure(params, stats)},
    )
    for stage in ("both", "one"):
        last, model = folder.model(stage)
        assert last.metric == figure(evaluated_params(model), model["batch_stats"])


def test_the_average_of_swa_is_the_mean_of_its_last_parameters(folder):
    seen = []

    def record(plan, state):
        seen.append(np.asarray(state.params["classifier"]))
        return state.batch_stats

    stages = (Stage(name="both", terms={"bce": 1.0}, num_steps=8),)
    folder.run(stages, average="swa", statistics=record, evaluate_every_steps=1)
    _, model = folder.model("both")
    expected = np.mean(seen[4:], axis=0)
    found = model["average_params"]["classifier"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - model["params"]["classifier"]).max() > 1e-4


def test_leaving_says_where_and_a_finished_run_is_left_alone(folder):
    with pytest.raises(Preempted, match="step 3 of stage both"):
        folder.run(leave_after=3)
    folder.run()
    before = (folder.path / "history.jsonl").read_text().count("train")
    folder.run()
    assert (folder.path / "history.jsonl").read_text().count("train") == before


def test_a_plateau_ends_a_stage_early(folder):
    stage = Stage(name="both", terms={"bce": 1.0}, num_steps=100, plateau_evaluations=2)
    last = folder.run((stage,))
    assert last.step == 6
    assert last.finished


def test_the_next_stage_starts_from_the_best_by_the_metric(folder):
    metrics = iter([0.1, 0.9, 0.2, 0.5, 0.5, 0.5])
    stages = (STAGES[0], Stage(name="one", terms={"bce": 1.0}, num_steps=4))
    folder.run(stages, metric=lambda *_: {METRIC: next(metrics)})
    assert "starting from step 4 of stage both (best)" in folder.output.getvalue()


def test_gradients_that_stay_infinite_stop_the_run_and_keep_the_checkpoint(folder):
    def breaking(split, start):
        for i, batch in enumerate(batches(split, start)):
            broken = np.full((BATCH, 1), np.inf, np.float32)
            yield {**batch, "label_confidences": broken} if i >= 3 else batch

    told = (
        r"3 consecutive updates up to step 6 .* step 3 was the last good step, and the "
        r"last checkpoint \(step 4\) is good"
    )
    with pytest.raises(Diverged, match=told):
        folder.run(batches=breaking)
    last, model = folder.model("both")
    assert last.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


def test_a_run_whose_first_updates_all_fail_says_that_nothing_was_saved(folder):
    def broken(split, start):
        for batch in batches(split, start):
            yield {
                **batch,
                "label_confidences": np.full((BATCH, 1), np.nan, np.float32),
            }

    told = "step 0 was the last good step, and no checkpoint was saved"
    with pytest.raises(Diverged, match=told):
        folder.run(batches=broken, evaluate_every_steps=4)


@pytest.fixture
def full_disk(monkeypatch):
    """Fills the disk for saves of some steps: {step: number of failing saves}."""
    times = {}
    finalize = ocp.StandardCheckpointHandler.finalize

    def fail(self, directory):
        for step in times:
            if f"/{step}." in str(directory) and times[step] > 0:
                times[step] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finalize(self, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", fail)
    return times


def test_a_failed_save_stops_the_run_which_goes_on_from_the_last_complete_one(
    folder, full_disk
):
    full_disk[4] = 1
    text = "step 4 .*No space left on device.*continues from step 2"
    with pytest.raises(FailedSave, match=text):
        folder.run()
    assert folder.model("both")[0].step == 2
    assert folder.run().step == 10


def test_a_run_can_go_on_after_a_failed_save(folder, full_disk):
    full_disk[4] = 1
    full_disk[8] = 1
    assert folder.run(continue_after_failed_save=True).step == 10
    lines = folder.output.getvalue().splitlines()
    told = [line for line in lines if "Training continues without it." in line]
    assert len(told) == 2
    assert "step 4 " in told[0] and "continues from step 2" in told[0]
    assert "step 8 " in told[1] and "restarts the stage" in told[1]
    checkpoints = folder.path / "checkpoints"
    left = {path.name for path in checkpoints.glob("*/*") if path.name[0] != "."}
    assert left == {"6", "10"}


def test_what_the_next_stage_starts_from_is_saved_again_where_it_failed(
    folder, full_disk
):
    full_disk[6] = 1
    assert folder.run(continue_after_failed_save=True).step == 10
    assert folder.model("both")[0].step == 6


def test_a_stage_whose_end_cannot_be_saved_stops_the_run_in_any_case(folder, full_disk):
    full_disk[6] = 2
    with pytest.raises(FailedSave, match="step 6 "):
        folder.run(continue_after_failed_save=True)
    assert folder.model("both")[0].step == 4


def test_pretrained_parameters_replace_fresh_ones_at_the_start_only(folder):
    zeros = PretrainedWeights(
        source="zeros",
        params={"classifier": np.zeros((FEATURES, NUM_CLASSES), np.float32)},
        batch_stats={},
    )
    stages = (Stage(name="both", terms={"bce": 1.0}, num_steps=2),)
    folder.run(stages, start=zeros, rate=1e-30)
    assert "stage both: starting from zeros" in folder.output.getvalue()
    _, model = folder.model("both")
    assert np.abs(model["params"]["classifier"]).max() < 1e-20


def test_the_average_is_inherited_where_there_is_one():
    model = {
        "params": {"classifier": np.ones(2, np.float32)},
        "average_params": {"classifier": np.zeros(2, np.float32)},
        "batch_stats": {},
    }
    params, _ = inherit(model, {"classifier": jnp.ones(2)}, "stage a")
    np.testing.assert_array_equal(params["classifier"], 0.0)


@pytest.mark.parametrize("width", [2, 3])
def test_a_trunk_alone_is_inherited_on_every_device(tmp_path, monkeypatch, width):
    def init(key):
        params = {"trunk": {"kernel": jnp.ones(2)}, "classifier": jnp.ones(3)}
        return params, {"trunk": {"mean": jnp.ones(2)}}

    kernel = {"kernel": jnp.zeros(width)}
    model = {
        "params": {"trunk": {"kernel": jnp.ones(width)}, "classifier": jnp.zeros(4)},
        "average_params": {"trunk": kernel, "classifier": jnp.zeros(4)},
        "batch_stats": {"trunk": {"mean": jnp.zeros(width)}},
    }
    checkpoints = Checkpoints(tmp_path, ["a"], "", read_only=True)
    where = replicated(make_mesh())
    monkeypatch.setattr(checkpoints, "model_shapes", lambda saved: model)
    monkeypatch.setattr(
        checkpoints, "restore_model", lambda *_: jax.device_put(model, where)
    )
    saved = Saved(stage="a", step=1, first_step=0)
    weights = CheckpointWeights(checkpoints=checkpoints, saved=saved, source="a")
    if width == 3:
        with pytest.raises(InputError, match=r"the trunk of a .*kernel is \[3\]"):
            weights.trunk().check_fits(init)
        return
    weights.trunk().check_fits(init)
    params, batch_stats = weights.trunk().load(init, jax.random.key(0), where)
    np.testing.assert_array_equal(params["trunk"]["kernel"], 0.0)
    np.testing.assert_array_equal(batch_stats["trunk"]["mean"], 0.0)
    np.testing.assert_array_equal(params["classifier"], np.ones(3))
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {where}


def test_another_shape_is_not_inherited():
    model = {"params": {"classifier": np.ones(2, np.float32)}, "batch_stats": {}}
    with pytest.raises(InputError, match=r"stage a does not fit.*classifier is \[2\]"):
        inherit(model, {"classifier": jnp.ones(3)}, "stage a")


def test_a_head_that_is_not_there_is_not_inherited():
    model = {"params": {"classifier": np.ones(2, np.float32)}, "batch_stats": {}}
    like = {"classifier": jnp.ones(2), "embedding": jnp.ones(2)}
    with pytest.raises(InputError, match="embedding is absent there"):
        inherit(model, like, "stage a")


def test_another_run_is_where_the_first_stage_starts(folder, tmp_path):
    stages = (Stage(name="one", terms={"bce": 1.0}, num_steps=2),)
    other = Checkpoints(tmp_path / "other", ["one"], "0123456789abcdef")
    state = plan(stages[0], 0.1, "none").state_of(
        {"classifier": jnp.full((FEATURES, NUM_CLASSES), 2.0)},
        {"mean": jnp.full(2, 3.0)},
        step=7,
    )
    saved = Saved(stage="one", step=7, first_step=0)
    state = jax.device_put(state, replicated(make_mesh()))
    other.save(metadata_of(saved), state)
    other.wait()
    start = CheckpointWeights(checkpoints=other, saved=saved, source="step 7 of a run")
    folder.run(stages, start=start, rate=1e-30)
    _, found = folder.model("one")
    np.testing.assert_allclose(found["params"]["classifier"], 2.0)
    np.testing.assert_array_equal(found["batch_stats"]["mean"], 3.0)
    assert "starting from step 7 of a run" in folder.output.getvalue()
    other.close()


def test_of_a_stage_on_tuning_the_last_checkpoint_is_the_best(folder):
    metrics = iter([0.9, 0.2, 0.1])
    stages = (Stage(name="one", terms={"bce": 1.0}, num_steps=6, split="tuning"),)
    folder.run(stages, metric=lambda *_: {METRIC: next(metrics)})
    checkpoints = Checkpoints(folder.path, ["one"], "0123456789abcdef")
    best = checkpoints.best_of()
    assert (best.step, best.metric) == (6, None)
    assert [metric for _, metric in best.evaluations] == [0.9, 0.2, 0.1]
    checkpoints.close()


def test_train_step_is_compiled_once_a_stage_and_says_so(undisturbed):
    assert undisturbed.output.getvalue().count("train_step compiled 1 time(s)") == 2


def test_with_another_batch_size_it_goes_on_at_the_exact_example(folder):
    asked = []

    def counted(split, start):
        asked.append(start)
        for first in itertools.count(start, 2 * BATCH):
            pair = [next(batches(split, first + offset)) for offset in (0, BATCH)]
            yield {key: np.concatenate([b[key] for b in pair]) for key in pair[0]}

    with pytest.raises(Preempted):
        folder.run(leave_after=4)
    # The same number of epochs.
    shorter = tuple(
        replace(s, num_steps=s.num_steps // 2, in_epochs=True) for s in STAGES
    )
    last = folder.run(shorter, batch=2 * BATCH, batches=counted)
    # 4 steps of 8, then the rest of 6 x 8 and 4 x 8 in steps of 16.
    assert asked == [4 * BATCH, 6 * BATCH]
    assert (last.step, last.example) == (4 + 1 + 2, 10 * BATCH)


@pytest.mark.parametrize("batch", [BATCH // 2, 2 * BATCH])
def test_with_another_batch_size_a_stage_keeps_its_number_of_steps(folder, batch):
    with pytest.raises(Preempted):
        folder.run(leave_after=3)
    last = folder.run(batch=batch)
    assert (last.step, last.first_step, last.finished) == (10, 6, True)
    assert last.example == 3 * BATCH + 7 * batch
    rows = read_history(folder.path / "history.jsonl")
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 11))


def test_asked_to_stop_at_the_end_of_a_stage_it_begins_no_other(folder):
    with pytest.raises(Preempted, match="step 6 of stage both"):
        folder.run(leave_after=6)
    assert folder.model("both")[0].finished
    assert "stage one" not in folder.output.getvalue()


def test_with_a_divided_optimizer_state_a_run_left_and_resumed_ends_the_same(
    folder, undisturbed
):
    with pytest.raises(Preempted):
        folder.run(leave_after=3, shard_state=True)
    folder.run(shard_state=True)
    ends = [
        each.model("one")[1]["params"]["classifier"] for each in (undisturbed, folder)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-5)
    assert folder.output.getvalue().count("train_step compiled 1 time(s)") == 2


def test_some_steps_are_traced_into_the_workdir_across_stages(folder, tmp_path):
    folder.run(profiler=Profiler(tmp_path / "profile", 5, 7))
    assert "profile of steps 5 to 7: " in folder.output.getvalue()
    assert any((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_trace_of_a_run_that_is_left_names_the_steps_it_holds(folder, tmp_path):
    with pytest.raises(Preempted):
        folder.run(profiler=Profiler(tmp_path / "profile", 2, 9), leave_after=4)
    assert "profile of steps 2 to 4: " in folder.output.getvalue()
