"""Tests local devices, TPU slices, and the error for a slice that does not exist."""

import os
import subprocess
import sys

import jax
import pytest

from jaxii.errors import InputError
from jaxii.planner import topology
from jaxii.planner.topology import CHIPS, GIB, parse, peak_flops

# Each slice has its own process, because `absent` hides the devices of its process.
OPEN = """
import re, sys, jax, jax.numpy as jnp
from jaxii.planner.topology import absent
from jaxii.distributed.mesh import replicated
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
    """Restores what `absent` sets for the process that plans."""
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


def test_a_slice_is_a_chip_and_its_sides():
    assert parse("v5e:16x16") == (CHIPS["v5e"], (16, 16))
    assert parse("v4:2x2x1") == (CHIPS["v4"], (2, 2, 1))


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ("v5e:4x5", "v5e:4x4, v5e:4x8.*the nearest is v5e:4x"),
        # The compiler aborts the process if the slice is too large.
        ("v5e:32x32", "v5e:16x16"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("v5e-16", "use local or .*v5e:16x16.*v6e:1x1"),
        ("v7:2x2", "v4:2x2x1.*v5p.*v6e"),
        ("", "use local or "),
    ],
)
def test_an_unknown_slice_is_refused_with_those_there_are(given, pattern):
    with pytest.raises(
        InputError, match=f"--topology={given} is not a TPU slice.*{pattern}"
    ):
        parse(given)


def test_a_plane_is_a_ring_only_along_a_side_of_16():
    chip = CHIPS["v6e"]
    assert [chip.wraps((8, 16), axis) for axis in range(2)] == [False, True]


def test_a_cube_is_a_ring_along_every_side_if_all_are_whole():
    chip = CHIPS["v5p"]
    assert all(chip.wraps((4, 4, 8), axis) for axis in range(3))
    assert not any(chip.wraps((2, 4, 4), axis) for axis in range(3))


@pytest.mark.parametrize(
    ("device_kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_a_device_has_the_peak_of_its_kind_or_none_that_is_known(device_kind, flops):
    assert peak_flops(device_kind) == flops
