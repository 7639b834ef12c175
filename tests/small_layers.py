"""Layers and networks reduced for tests that do not need more."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxii.distributed.mesh import make_mesh
from jaxii.models.layers import BatchNorm, Conv
from jaxii.models.resnet import DEPTHS
from jaxii.runs import assembly, speed


def norm_of(num_channels=3, **kwargs):
    kwargs = {"axis_name": None, "dtype": jnp.float32, **kwargs}
    return BatchNorm(num_channels, **kwargs)


def conv_of(*sizes, **kwargs):
    kwargs = {"cpu_forms": False, "dtype": jnp.float32, **kwargs}
    return Conv(*sizes, rngs=nnx.Rngs(params=0), **kwargs)


@contextlib.contextmanager
def few_blocks(*num_blocks):
    """Gives every ResNet this many blocks per stage: each takes seconds to compile.

    (2, 1, 1, 1) has blocks with and without a stride and a projection.
    """
    with pytest.MonkeyPatch.context() as patch:
        for depth, (_, bottleneck) in DEPTHS.items():
            patch.setitem(DEPTHS, depth, (num_blocks, bottleneck))
        own_networks(patch)
        yield


def own_networks(patch):
    """Gives runs their own networks during `patch`, because networks are cached."""
    made_anew = functools.cache(assembly.network_of.__wrapped__)
    patch.setattr(assembly, "network_of", made_anew)


@contextlib.contextmanager
def measured_quickly(monkeypatch):
    """Makes `runs.speed` measure briefly, on one device, hardly optimised."""
    monkeypatch.setattr(speed, "INPUT_SECONDS", 0.05)
    monkeypatch.setattr(speed, "STEP_SECONDS", 0.05)
    # Compiling for the eight devices of the tests takes long.
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(speed, "make_mesh", lambda: mesh)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
