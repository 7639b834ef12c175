"""Tests counts of memory and operations, and traces of the requested steps."""

import jax
import jax.numpy as jnp
import pytest

from jaxii.train.telemetry import profiling
from jaxii.train.telemetry.profiling import Profiler


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: made.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


def go(profiler, calls, steps):
    for step in steps:
        profiler.at(step)
        calls.append(step)
        profiler.updated(step + 1, [])


def test_the_updates_between_the_two_steps_are_traced(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(6))
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
    assert profiler.close() == f"profile of steps 2 to 4: {tmp_path}"


def test_a_run_that_is_resumed_among_them_traces_the_rest(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(3, 6))
    assert calls == ["start", 3, "stop", 4, 5]
    assert profiler.close() == f"profile of steps 3 to 4: {tmp_path}"


def test_a_run_that_ends_among_them_keeps_what_was_traced(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(3))
    assert profiler.close() == f"profile of steps 2 to 3: {tmp_path}"
    assert calls == [0, 1, "start", 2, "stop"]


@pytest.mark.parametrize("last", [3, 9])
def test_the_newest_update_is_awaited_before_a_trace_ends(
    last, calls, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "block_until_ready", calls.append)
    profiler = Profiler(tmp_path, 2, last)
    for step in (2, 3):
        profiler.at(step)
        profiler.updated(step + 1, f"computed {step + 1}")
    profiler.close()
    newest = "computed 3" if last == 3 else "computed 4"
    assert calls == [None, "start", newest, "stop"]


def test_a_run_without_those_steps_says_so(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(4, 8))
    assert "did not train steps 2 to 4" in profiler.close()
    assert calls == [4, 5, 6, 7]


def test_without_steps_nothing_is_traced_and_nothing_said(calls):
    profiler = Profiler()
    go(profiler, calls, range(3))
    assert calls == [0, 1, 2]
    assert profiler.close() == ""


def test_tensorboard_and_perfetto_find_their_files(tmp_path):
    profiler = Profiler(tmp_path, 0, 1)
    profiler.at(0)
    profiler.updated(1, jnp.ones(3) + 1.0)
    profiler.at(1)
    endings = {"".join(path.suffixes[-2:]) for path in tmp_path.rglob("*.*")}
    assert any(tmp_path.glob("plugins/profile/*/*.xplane.pb")), endings
    assert any(tmp_path.glob("plugins/profile/*/*.trace.json.gz")), endings


def test_the_memory_of_this_process_is_told():
    assert profiling.memory_bytes()["host_memory_bytes"] > 50e6


def test_the_memory_of_devices_is_told_only_where_they_count_it(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert "device_memory_bytes" not in profiling.memory_bytes()
    counting = [Device({"peak_bytes_in_use": n}) for n in (5, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: counting)
    assert profiling.memory_bytes()["device_memory_bytes"] == 7.0


def test_the_operations_of_a_matrix_product_are_counted():
    product = jax.jit(jnp.matmul)
    given = jnp.ones((32, 64)), jnp.ones((64, 16))
    assert profiling.step_flops(product, *given) == pytest.approx(2 * 32 * 64 * 16)


def test_on_a_gpu_the_compiler_is_not_asked(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    product = jax.jit(jnp.matmul)
    given = jnp.ones((32, 64)), jnp.ones((64, 16))
    assert profiling.step_flops(product, *given) == 2 * 32 * 64 * 16


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_are_three_times_one(stride):
    def total(images, kernel):
        strides = (stride, stride)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jnp.sum(
            jax.lax.conv_general_dilated(
                images, kernel, strides, "SAME", dimension_numbers=numbers
            )
            ** 2
        )

    shapes = (2, 8, 8, 4), (3, 3, 4, 6)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    once = 2 * 2 * (8 // stride) ** 2 * 6 * 3 * 3 * 4
    forwards = jax.jit(total).trace(*given).jaxpr
    assert profiling.product_flops(forwards) == once
    with_gradients = jax.jit(jax.grad(total, argnums=(0, 1))).trace(*given).jaxpr
    assert profiling.product_flops(with_gradients) == 3 * once


@pytest.mark.parametrize(("unroll", "copies"), [(1, 1), (True, 5)])
def test_a_loop_counts_as_one_iteration_unless_it_is_unrolled(unroll, copies):
    def summed(slices, kernel):
        def add(total, piece):
            return total + piece @ kernel, None

        return jax.lax.scan(add, jnp.zeros((2, 4)), slices, unroll=unroll)[0]

    program = jax.jit(summed).trace(jnp.ones((5, 2, 3)), jnp.ones((3, 4))).jaxpr
    assert profiling.product_flops(program) == copies * 2 * 2 * 3 * 4
