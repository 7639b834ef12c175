"""What a run takes of its machine is told in bytes and operations."""

import jax
import jax.numpy as jnp
import pytest

from jaxii.train.telemetry import machine


def test_the_memory_of_this_process_is_told():
    assert machine.memory_bytes()["host_memory_bytes"] > 50e6


def test_the_memory_of_devices_is_told_only_where_they_count_it(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert "device_memory_bytes" not in machine.memory_bytes()
    counting = [Device({"peak_bytes_in_use": n}) for n in (5, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: counting)
    assert machine.memory_bytes()["device_memory_bytes"] == 7.0


def test_the_operations_of_a_matrix_product_are_counted():
    product = jax.jit(jnp.matmul)
    given = jnp.ones((32, 64)), jnp.ones((64, 16))
    assert machine.step_flops(product, *given) == pytest.approx(2 * 32 * 64 * 16)
