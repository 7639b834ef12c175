"""Layers and networks without what most tests of the model do not care about."""

import contextlib

import jax.numpy as jnp
import pytest
from flax import nnx

from jaxii.models.layers import BatchNorm, Conv
from jaxii.models.resnet import DEPTHS


def norm_of(num_channels=3, **kwargs):
    kwargs = {"axis_name": None, "dtype": jnp.float32, **kwargs}
    return BatchNorm(num_channels, **kwargs)


def conv_of(*sizes, **kwargs):
    kwargs = {"cpu_forms": False, "dtype": jnp.float32, **kwargs}
    return Conv(*sizes, rngs=nnx.Rngs(params=0), **kwargs)


@contextlib.contextmanager
def few_blocks(*num_blocks):
    """Gives every ResNet so many blocks a stage: each takes seconds to compile.

    With (2, 1, 1, 1) there are blocks with and without a stride and a projection.
    """
    with pytest.MonkeyPatch.context() as patch:
        for depth, (_, bottleneck) in DEPTHS.items():
            patch.setitem(DEPTHS, depth, (num_blocks, bottleneck))
        yield
