"""The flags for XLA, and what the program asks of a GPU, as far as a CPU can tell."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import numpy as np
import optax
import pytest
from etils import epath

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed import xla_flags
from jaxii.distributed.mesh import make_mesh
from jaxii.distributed.xla_flags import CPU_FLAGS, CPU_VERSIONS, GPU_FLAGS, with_flags
from jaxii.runs.plan import Facts, batch_shapes, choose_stage, plan_stage
from jaxii.train.checkpoint_manager import make_manager, save
from jaxii.train.sharding import state_shapes
from jaxii.train.state import new_state
from jaxii.train.step import make_train_step

FACTS = Facts(num_classes=20, num_slots=8, num_images=1000, source="")
NHWC = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"


@pytest.fixture(scope="module")
def program():
    """The train step of the recipe for millions of photos, lowered for a GPU."""
    config = Config.resolve(f2_multitask.get_config("inclusive_images"))
    planned, vectors = plan_stage(config, FACTS, choose_stage(config, FACTS), "cuda")
    mesh = make_mesh(jax.devices()[:1])
    state = jax.eval_shape(planned.fresh_state, jax.random.key(0))
    state = state_shapes(state, mesh, planned.settings.shard_state)
    batch = batch_shapes(config, FACTS, 64)
    traced = make_train_step(planned.settings, mesh).trace(state, batch, vectors)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, jax.tree.leaves(state)


def test_every_convolution_is_one_of_cudnns_in_bfloat16(program):
    text, _ = program
    convolutions = re.findall(r"stablehlo\.convolution.*", text)
    # ResNet-50's 53 forwards and as many weight gradients; the images need none.
    assert len(convolutions) == 53 + 53 + 52
    assert all("bf16>) -> tensor" in line for line in convolutions)
    forwards = [line for line in convolutions if f"dim_numbers = {NHWC}" in line]
    assert len(forwards) >= 53


def test_the_state_is_updated_in_place(program):
    text, state = program
    donated = re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text)
    assert len(donated) == len(state)


def test_checkpoints_go_through_pinned_memory(monkeypatch, tmp_path):
    kinds = []
    put = jax.device_put

    def spy(value, device=None, **options):
        kinds.append(getattr(device, "memory_kind", None))
        return put(value, device, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", spy)
    params, still = {"weights": jax.numpy.arange(8.0)}, optax.set_to_zero()
    state = new_state(
        params=params, batch_stats={}, optimizer=still, step=1, with_average=False
    )
    manager = make_manager(epath.Path(tmp_path), read_only=False, meet=lambda **_: None)
    save(manager, state, {"step": 1, "metric": None})
    assert "pinned_host" in kinds
    restored = manager.restore(1)["model"]["params"]
    np.testing.assert_array_equal(restored["weights"], params["weights"])


def test_the_flags_are_known_to_xla():
    def starts(flags):
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        return subprocess.run(command, env=environment, capture_output=True)

    assert starts(with_flags("", {**GPU_FLAGS, **CPU_FLAGS})).returncode == 0
    unknown = starts("--xla_gpu_no_such_flag=true")
    assert unknown.returncode != 0
    assert b"xla_gpu_no_such_flag" in unknown.stderr


def test_flags_that_are_set_stay():
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"
    words = with_flags(given, GPU_FLAGS).split()
    assert words[:2] == given.split()
    assert words[2:] == ["--xla_gpu_exclude_nondeterministic_ops=true"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Returns the flags that are set on a machine as described."""

    def flags(*, has_driver=False, system="linux", processor="x86_64", jaxlib="0.12.0"):
        driver = tmp_path / "nvidiactl"
        if has_driver:
            driver.touch()
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setattr(xla_flags, "DRIVER", (driver,))
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr("platform.machine", lambda: processor)
        monkeypatch.setattr(xla_flags, "version", lambda package: jaxlib)
        xla_flags.set_flags()
        words = os.environ["XLA_FLAGS"].split()
        return {word.lstrip("-").partition("=")[0] for word in words}

    return flags


def test_flags_are_those_of_the_devices(machine):
    assert machine() == {*CPU_FLAGS}
    assert machine(processor="aarch64") == machine(system="darwin") == set()
    assert machine(has_driver=True) == {*CPU_FLAGS, *GPU_FLAGS}
    assert machine(has_driver=True, processor="aarch64") == {*GPU_FLAGS}


def test_flags_for_cpus_are_only_set_for_releases_in_which_they_were_measured(machine):
    assert machine(jaxlib="0.10.2") == machine(jaxlib="0.12.0.1") == {*CPU_FLAGS}
    assert machine(jaxlib="0.13.0") == machine(jaxlib="0.1.12") == set()
    assert version("jaxlib").startswith(CPU_VERSIONS)


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_is_fast_with_matrix_units(machine, monkeypatch, tmp_path, has_units):
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags\t\t: fpu avx512f{' amx_bf16' * has_units} amx_tile\n")
    monkeypatch.setattr(xla_flags, "CPU_INFO", info)
    machine(jaxlib="0.12.0")
    assert xla_flags.has_fast_bfloat16() == has_units
    machine(jaxlib="0.10.2")
    assert not xla_flags.has_fast_bfloat16()
    machine(processor="aarch64")
    assert not xla_flags.has_fast_bfloat16()


CONVOLUTIONS = """
import os
from jaxii.distributed import xla_flags

os.environ["XLA_FLAGS"] = ""
xla_flags.set_flags()
import jax
import jax.numpy as jnp
from jaxii.models import cpu
from jaxii.models.layers import convolve

def total(x, kernel):
    return jnp.sum(cpu.convolve(x, kernel, 1, 1, plain=convolve).astype(jnp.float32))

x = jax.ShapeDtypeStruct((8, 28, 28, 64), jnp.bfloat16)
kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.bfloat16)
program = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(x, kernel).compile()
print(program.as_text())
"""


def test_no_convolution_of_a_step_is_computed_by_ynnpack():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CONVOLUTIONS]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    with_onednn = run.stdout.count('custom_call_target="__onednn$convolution"')
    others = len(re.findall(r" convolution\(", run.stdout))
    # Forward, and the gradients of images and of the kernel.
    assert with_onednn + others == 3
    assert "kind=kCustom, calls=%ynn" not in run.stdout
    if xla_flags.has_fast_bfloat16():
        assert with_onednn == 3
