"""Tests how XLA compiles networks for CPUs; test_layers tests the forms of layers."""

import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.version import __version__ as jaxlib_version

from configs import f2_multitask
from jaxii.config import Config
from jaxii.distributed.mesh import make_mesh
from jaxii.evaluation.predictor import Model, make_features, make_predict
from jaxii.models import cpu
from jaxii.models.layers import convolve
from jaxii.models.multitask import Outputs
from jaxii.runs.assembly import network_of
from jaxii.runs.plan import Facts, batch_shapes, choose_stage, plan_stage
from jaxii.train.sharding import state_shapes
from jaxii.train.step import make_train_step

YNNPACK, ONEDNN = (
    "xla_cpu_experimental_ynn_fusion_type",
    "xla_cpu_experimental_onednn_custom_call",
)
UNKNOWN = (("xla_no_such_option", True),)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Describes a machine; returns the names of the options for a compute type."""

    def options(dtype, *, jaxlib, units="amx_bf16", system="linux", processor="x86_64"):
        info = tmp_path / "cpuinfo"
        info.write_text(f"flags\t\t: fpu avx512f {units} amx_tile\n")
        monkeypatch.setattr(cpu, "CPU_INFO", info)
        monkeypatch.setattr(cpu, "jaxlib_version", jaxlib)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr("platform.machine", lambda: processor)
        return {name for name, _ in cpu.compiler_options(dtype)}

    return options


@pytest.mark.parametrize("units", ["amx_bf16", "avx512_bf16"])
@pytest.mark.parametrize("jaxlib", ["0.12.0", "0.12.1.3"])
def test_bfloat16_is_given_to_onednn_where_the_cpu_has_units(machine, jaxlib, units):
    assert machine("bfloat16", jaxlib=jaxlib, units=units) == {YNNPACK, ONEDNN}
    assert cpu.has_fast_bfloat16()
    assert machine("float32", jaxlib=jaxlib) == set()
    assert machine("bfloat16", jaxlib=jaxlib, units="") == set()
    assert not cpu.has_fast_bfloat16()
    cpu.CPU_INFO.unlink()
    assert not cpu.has_fast_bfloat16()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_are_only_those_of_releases_in_which_they_were_measured(machine, dtype):
    assert machine(dtype, jaxlib="0.10.2") == {YNNPACK}
    assert not cpu.has_fast_bfloat16()
    for jaxlib in ("0.9.2", "0.11.0", "0.13.0", "0.1.12"):
        assert machine(dtype, jaxlib=jaxlib) == set()
    for jaxlib in ("0.10.2", "0.12.0"):
        assert machine(dtype, jaxlib=jaxlib, processor="aarch64") == set()
        assert machine(dtype, jaxlib=jaxlib, system="darwin") == set()


def test_other_platforms_have_no_options():
    model = Config.resolve(f2_multitask.get_config()).model

    def options_of(platform):
        return network_of(model, 20, 0, platform).compiler_options

    assert options_of("cuda") == options_of("tpu") == ()
    assert options_of("cpu") == cpu.compiler_options("float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_convolution_is_left_to_ynnpack_where_there_are_options(dtype):
    def total(x, kernel):
        y = cpu.convolve(x, kernel, 1, 1, plain=convolve)
        # Returned, so that the sum is not fused with the convolution.
        return jnp.sum(y.astype(jnp.float32)), y

    options = cpu.compiler_options(dtype)
    # With more channels, they would be matrix products in float32.
    shapes = (8, 28, 28, 48), (3, 3, 48, 48)
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    compiled = jax.jit(gradients, compiler_options=dict(options))
    text = compiled.lower(*given).compile().as_text()
    with_onednn = text.count('custom_call_target="__onednn$convolution"')
    others = len(re.findall(r" convolution\(", text))
    # Forward, and the gradients of the images and the kernel.
    assert with_onednn + others == 3
    assert with_onednn == 3 * (ONEDNN in dict(options))
    # YNNPACK's convolutions are instructions of the computations that it calls.
    called = re.findall(r"calls=%([\w.\-]+).*__ynn_fusion", text)
    parts = {part.split()[0]: part for part in re.split(r"\n\n+(?=%)", text)}
    has_ynnpack = any(" convolution(" in parts[f"%{name}"] for name in called)
    assert has_ynnpack == (not options)


def test_train_steps_are_compiled_with_the_options_of_their_settings():
    config = Config.resolve(f2_multitask.get_config())
    facts = Facts(num_classes=60, num_slots=8, num_images=1000, source="")
    planned, vectors = plan_stage(config, facts, choose_stage(config, facts))
    options = cpu.compiler_options(config.model.compute_dtype)
    assert planned.settings.compiler_options == options
    mesh = make_mesh(jax.devices()[:1])
    settings = replace(planned.settings, compiler_options=UNKNOWN)
    state = jax.eval_shape(planned.fresh_state, jax.random.key(0))
    state = state_shapes(state, mesh, settings.shard_state)
    step = make_train_step(settings, mesh)
    lowered = step.lower(state, batch_shapes(config, facts, 8), vectors)
    with pytest.raises(Exception, match="xla_no_such_option"):
        lowered.compile()


def apply(params, batch_stats, images, *, train, key):
    means = jnp.mean(images.astype(jnp.float32), axis=(1, 2))
    return Outputs(means @ params, None, means), batch_stats


@pytest.mark.parametrize(
    "compute",
    [
        lambda model, images, mesh: make_predict([model], mesh)(images),
        lambda model, images, mesh: make_features(model, mesh)(images),
        lambda model, images, mesh: model.adapted(
            [{"images": images, "mask": np.ones(len(images), np.float32)}], mesh
        ),
    ],
    ids=["predict", "features", "adapted"],
)
def test_models_are_compiled_with_their_options(compute):
    images = np.zeros((8, 4, 4, 3), np.uint8)
    stats = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    model = Model(apply=apply, params=np.ones((3, 2), np.float32), batch_stats=stats)
    compute(model, images, make_mesh())
    with pytest.raises(Exception, match="xla_no_such_option"):
        compute(replace(model, compiler_options=UNKNOWN), images, make_mesh())


def test_this_release_of_jaxlib_is_one_that_was_measured():
    assert jaxlib_version.startswith(("0.10.", "0.12."))
