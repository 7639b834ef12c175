"""Tests are stricter than production.

Eight simulated CPU devices, strict dtype promotion, no implicit rank promotion, runtime
type and shape checks over all of jaxii, and every warning an error.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

install_import_hook("jaxii", "typechecker.check")
