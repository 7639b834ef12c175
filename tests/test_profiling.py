"""Memory and operations are counted; a trace holds the steps that were asked for."""

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
        profiler.at(step, [])
        calls.append(step)


def test_the_updates_between_the_two_steps_are_traced(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(6))
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
    assert profiler.close() == f"profile of steps 2 to 4: {tmp_path}"


def test_a_run_that_is_resumed_among_them_traces_the_rest(calls, tmp_path):
    go(Profiler(tmp_path, 2, 4), calls, range(3, 6))
    assert calls == ["start", 3, "stop", 4, 5]


def test_a_run_that_ends_among_them_keeps_what_was_traced(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(3))
    assert profiler.close().startswith("profile of steps 2 to 4")
    assert calls == [0, 1, "start", 2, "stop"]


def test_a_run_without_those_steps_says_so(calls, tmp_path):
    profiler = Profiler(tmp_path, 2, 4)
    go(profiler, calls, range(4, 8))
    assert "steps 2 to 4 were not among those" in profiler.close()
    assert calls == [4, 5, 6, 7]


def test_without_steps_nothing_is_traced_and_nothing_said(calls):
    profiler = Profiler()
    go(profiler, calls, range(3))
    assert calls == [0, 1, 2]
    assert profiler.close() == ""


def test_tensorboard_and_perfetto_find_their_files(tmp_path):
    profiler = Profiler(tmp_path, 0, 1)
    profiler.at(0, [])
    made = jnp.ones(3) + 1.0
    profiler.at(1, [made])
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
