"""Tests figures of a small network's compiled step, and the largest fitting batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxii.distributed.mesh import make_mesh
from jaxii.objective.objective import make_objective
from jaxii.planner import compiled
from jaxii.planner.compiled import DoesNotFit, largest_batch, step_compiler
from jaxii.train.stages import Stage
from jaxii.train.step import StepSettings
from jaxii.train.trainer import StagePlan

NUM_CLASSES, SIZE, WIDTH = 5, 8, 64
NUM_INPUTS = SIZE * SIZE * 3
NUM_PARAMS = NUM_INPUTS * WIDTH + WIDTH * NUM_CLASSES


class Outputs(NamedTuple):
    logits: jax.Array
    embedding: None = None


def init(key):
    shapes = {"hidden": (NUM_INPUTS, WIDTH), "classifier": (WIDTH, NUM_CLASSES)}
    return {name: jnp.ones(shape) for name, shape in shapes.items()}, {}


def apply(params, batch_stats, images, *, train, key):
    pixels = images.reshape(images.shape[0], -1).astype(jnp.float32)
    features = jnp.tanh(pixels @ params["hidden"])
    return Outputs(features @ params["classifier"]), batch_stats


def compile_step(device_batch_size, micro_batches=1, hbm_bytes=None, **more):
    settings = StepSettings(
        apply=apply,
        objective=make_objective({"bce": 1.0}, num_steps=9, num_classes=NUM_CLASSES),
        optimizer=optax.sgd(0.1, 0.9),
        learning_rate=lambda step: jnp.float32(0.1),
        micro_batches=micro_batches,
        **more,
    )
    stage = Stage(name="small", terms={"bce": 1.0}, num_steps=9)
    plan = StagePlan(stage=stage, settings=settings, init=init)
    num_images = 8 * device_batch_size
    batch = {
        "images": ((num_images, SIZE, SIZE, 3), jnp.uint8),
        "label_ids": ((num_images, 3), jnp.int32),
        "label_confidences": ((num_images, 3), jnp.float32),
        "mask": ((num_images,), jnp.float32),
        "positions": ((num_images,), jnp.int32),
    }
    shapes = {name: jax.ShapeDtypeStruct(*array) for name, array in batch.items()}
    return step_compiler(plan, make_mesh(), None, hbm_bytes)(shapes)


@pytest.fixture(scope="module")
def figures():
    return compile_step(256)


def test_arguments_are_the_state_and_one_devices_share_of_the_batch(figures):
    state = 2 * 4 * NUM_PARAMS
    batch = 256 * (NUM_INPUTS + 2 * 3 * 4 + 4)
    # Positions are not an argument of a step without augmentation; counters are small.
    assert figures.argument_bytes == pytest.approx(state + batch, abs=2048)


def test_of_a_divided_optimizer_state_a_device_holds_an_eighth(figures):
    divided = compile_step(256, shard_state=True)
    spared = figures.argument_bytes - divided.argument_bytes
    # The momentum is divided; both arrays divide by eight.
    assert spared == pytest.approx(4 * NUM_PARAMS * 7 / 8, abs=64)
    assert divided.output_bytes == pytest.approx(figures.output_bytes, abs=64)


def test_flops_are_those_of_the_products_forwards_and_backwards(figures):
    hidden, classifier = NUM_INPUTS * WIDTH, WIDTH * NUM_CLASSES
    # Pixels need no gradient.
    expected = 2 * 256 * (2 * hidden + 3 * classifier)
    assert figures.flops == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("micro_batches", "unrolled"), [(1, False), (4, False), (4, True)]
)
def test_flops_on_a_gpu_are_counted_without_its_compiler(
    micro_batches, unrolled, monkeypatch
):
    monkeypatch.setattr(compiled, "_is_gpu", lambda mesh: True)
    hidden, classifier = NUM_INPUTS * WIDTH, WIDTH * NUM_CLASSES
    counted = compile_step(256, micro_batches, unrolled=unrolled).flops
    assert counted == 2 * 256 * (2 * hidden + 3 * classifier)


def test_gradients_and_sums_are_reduced_over_the_devices(figures):
    assert {one.kind for one in figures.collectives} == {"all-reduce"}
    num_bytes = sum(one.num_bytes for one in figures.collectives)
    assert num_bytes == pytest.approx(4 * NUM_PARAMS, rel=0.01)


def test_the_parts_add_up(figures):
    parts = (
        figures.argument_bytes,
        figures.output_bytes,
        figures.temporary_bytes,
        figures.program_bytes,
    )
    assert figures.total_bytes == sum(parts) and min(parts) >= 0


@pytest.mark.parametrize("unrolled", [False, True])
def test_micro_batches_are_counted_as_often_as_they_run(figures, unrolled):
    sliced = compile_step(256, micro_batches=4, unrolled=unrolled)
    # The update, which is outside of the loop, is counted as often: a few percent.
    assert figures.flops <= sliced.flops <= 1.1 * figures.flops
    assert [one.times for one in sliced.collectives] == [1] * len(sliced.collectives)


def test_a_program_that_needs_too_much_memory_is_told_in_the_compilers_words(
    monkeypatch,
):
    text = "RESOURCE_EXHAUSTED: Ran out of memory.\n  Used 20.5G of 15.75G hbm.\n"

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    class Step:
        def lower(self, *_):
            return Lowered()

    monkeypatch.setattr(compiled, "make_train_step", lambda *_: Step())
    with pytest.raises(DoesNotFit, match=r"^Used 20\.5G of 15\.75G hbm\.$"):
        compile_step(1)


def test_a_program_the_compiler_does_not_refuse_is_held_against_the_memory(figures):
    total = figures.total_bytes
    assert compile_step(256, hbm_bytes=total).total_bytes == total
    with pytest.raises(
        DoesNotFit, match=r"^needs \d\.\d\d GiB, but a device has \d\.\d\d GiB$"
    ):
        compile_step(256, hbm_bytes=total - 1)


def test_another_failure_of_the_compiler_is_not_taken_for_it(monkeypatch):
    class Step:
        def lower(self, *_):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(compiled, "make_train_step", lambda *_: Step())
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        compile_step(1)


class Compiler:
    """Memory with a fixed part and a part per image; refuses above a limit."""

    def __init__(self, fixed, each, limit):
        self.fixed, self.each, self.limit, self.asked = fixed, each, limit, []

    def __call__(self, size):
        self.asked.append(size)
        total = self.fixed + self.each * size
        return total if total <= self.limit else None


def test_memory_on_a_line_takes_three_compiles():
    compiler = Compiler(fixed=1000, each=10, limit=5000)
    found = largest_batch(compiler, start=128, hbm_bytes=5000)
    assert found == (400, 5000)
    assert compiler.asked == [128, 64, 400]


def test_what_the_compiler_refuses_is_no_answer():
    # It has less room than it should.
    compiler = Compiler(fixed=1000, each=10, limit=4700)
    found = largest_batch(compiler, start=128, hbm_bytes=5000)
    assert compiler.asked == [128, 64, 400, 344]
    assert found == (344, 4440) and compiler(344) is not None


def test_a_start_that_does_not_fit_is_halved_until_it_does():
    compiler = Compiler(fixed=1000, each=10, limit=2000)
    found = largest_batch(compiler, start=512, hbm_bytes=2000)
    assert found == (96, 1960) and compiler.asked[:3] == [512, 256, 128]


def test_a_start_that_is_the_largest_is_the_answer():
    compiler = Compiler(fixed=1000, each=10, limit=2280)
    found = largest_batch(compiler, start=128, hbm_bytes=2280)
    assert found == (128, 2280) and compiler.asked == [128, 64]


def test_what_is_tried_divides_over_micro_batches():
    compiler = Compiler(fixed=1000, each=10, limit=5000)
    found = largest_batch(compiler, start=96, hbm_bytes=5000, micro_batches=3)
    assert found is not None and found[0] == 384
    assert all(size % 3 == 0 for size in compiler.asked)


@pytest.mark.parametrize("start", [1, 2])
def test_no_batch_fits_where_one_image_does_not(start):
    assert largest_batch(Compiler(100, 1, 50), start=start, hbm_bytes=50) is None


def test_one_image_is_compared_with_two():
    assert largest_batch(Compiler(100, 10, 125), start=1, hbm_bytes=125) == (2, 120)
    compiler = Compiler(100, 10, 115)
    assert largest_batch(compiler, start=1, hbm_bytes=115) == (1, 110)
    assert compiler.asked == [1, 2]
