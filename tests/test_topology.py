"""Devices at hand, and slices that are not there (where the TPU compiler is)."""

import os
import subprocess
import sys

import jax
import pytest

from jaxii.errors import InputError
from jaxii.planner import topology
from jaxii.planner.chips import CHIPS, GIB

# Each slice is opened in a process of its own: `absent` turns it away from its devices.
OPEN = """
import re, sys, jax, jax.numpy as jnp
from jaxii.planner.topology import absent
from jaxii.train.mesh import replicated
found = absent(sys.argv[1])
whole = replicated(found.mesh)
print(found.num_devices, found.device_kind, sep="|")
large = jax.ShapeDtypeStruct((500_000, 500_000), jnp.float32, sharding=whole)
try:
    jax.jit(lambda x: jnp.sort(x + 1.0), out_shardings=whole).lower(large).compile()
except jax.errors.JaxRuntimeError as error:
    print(*re.findall(r"available HBM \\(([\\d.]+)G\\)", str(error)))
"""


def has_tpu_compiler():
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def test_local_is_the_devices_at_hand():
    found = topology.local()
    assert found.num_devices == jax.device_count() == 8
    assert found.sides == (8,) and found.device_kind == "cpu"


def test_of_a_cpu_neither_peaks_nor_memory_are_known():
    found = topology.local()
    assert found.chip is None and found.hbm_bytes is None
    assert found.network_bandwidth is None


def test_an_unknown_slice_is_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="--topology=v5e:3x3"):
        topology.absent("v5e:3x3")


@pytest.fixture
def settings_back(monkeypatch):
    """Puts back what `absent` sets for the process that plans."""
    names = ("jax_platforms", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_without_the_tpu_compiler_a_person_is_told_what_to_install(
    monkeypatch, settings_back
):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate topology.")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"pip install 'jaxii\[tpu\]'"):
        topology.absent("v5e:4x4")


@pytest.mark.skipif(not has_tpu_compiler(), reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("name", "num_devices"),
    [("v4:2x2x1", 4), ("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:1x1", 1)],
)
def test_a_slice_has_the_chips_and_the_memory_that_its_compiler_says(name, num_devices):
    result = subprocess.run(
        [sys.executable, "-c", OPEN, name], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    devices, memory = result.stdout.split("\n")[:2]
    chip = CHIPS[name.split(":")[0]]
    assert devices == f"{num_devices}|{chip.device_kind}"
    assert float(memory) * GIB == chip.hbm_bytes
