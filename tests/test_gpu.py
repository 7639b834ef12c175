"""Tests what is requested of an NVIDIA GPU, as far as possible without one."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from etils import epath

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed import gpu
from jaxii.distributed.mesh import make_mesh
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
    # ResNet-50 has 53 forward convolutions and weight gradients; images need no
    # gradient.
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

    assert starts(gpu.with_flags("")).returncode == 0
    unknown = starts("--xla_gpu_no_such_flag=true")
    assert unknown.returncode != 0
    assert b"xla_gpu_no_such_flag" in unknown.stderr


def test_flags_that_are_set_stay():
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/x"
    words = gpu.with_flags(given).split()
    assert words[:2] == given.split()
    assert words[2:] == ["--xla_gpu_exclude_nondeterministic_ops=true"]


@pytest.mark.parametrize("has_driver", [True, False])
def test_flags_are_set_where_there_is_a_gpu(has_driver, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "")
    driver = tmp_path / "nvidiactl"
    if has_driver:
        driver.touch()
    monkeypatch.setattr(gpu, "DRIVER", (driver,))
    gpu.set_flags()
    assert bool(os.environ["XLA_FLAGS"]) == has_driver
