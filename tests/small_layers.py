"""Layers with the settings that most tests of the model do not care about."""

import jax.numpy as jnp
from flax import nnx

from jaxii.models.layers import BatchNorm, Conv


def norm_of(num_channels=3, **kwargs):
    kwargs = {"momentum": 0.9, "axis_name": None, "dtype": jnp.float32, **kwargs}
    return BatchNorm(num_channels, **kwargs)


def conv_of(*sizes, **kwargs):
    kwargs = {"cpu_forms": False, "dtype": jnp.float32, **kwargs}
    return Conv(*sizes, rngs=nnx.Rngs(params=0), **kwargs)
