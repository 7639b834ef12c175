"""Flags that jaxii adds to XLA_FLAGS, for NVIDIA GPUs and for x86 CPUs.

GPUs. Other modules make the remaining choices. Convolutions are NHWC
(`models.layers.convolve`), the layout that cuDNN's tensor cores read. The train step
donates the buffers of its input state (`train.step.make_train_step`). The loop
dispatches ahead of the device (`train.trainer.STEPS_AHEAD`), so batches are copied
while a step runs. Copies between host and GPU use pinned memory, which the GPU reads
and writes directly: XLA stages batches in its own buffers, and Orbax copies checkpoints
to memory of the kind `pinned_host` (`train.checkpoint_manager`).

Everything else is XLA's default. Command buffers (CUDA graphs) are on. For each
convolution and matrix product, XLA times several kernels at compilation and uses the
fastest (`xla_gpu_autotune_level`). The choice is kept with the compiled program in the
folder of `cli.start.CACHE`, so a run that resumes on the same machine uses the same
kernels. For equal results on another machine, share that folder, or set
XLA_FLAGS=--xla_gpu_deterministic_ops=true, which times no kernels and is slower.

CPUs. By default, XLA computes convolutions with YNNPACK, whose weight gradients are
slow. Without it, jaxlib 0.12 computes them with oneDNN, which uses the matrix units
(AMX) of recent CPUs for bfloat16, and jaxlib 0.10 with Eigen.
"""

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

# Files that NVIDIA's driver creates: on Linux, in containers, in WSL.
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
GPU_FLAGS = {
    # Excludes kernels whose sums depend on the order in which threads finish, so that
    # repeated and resumed runs are equal bit for bit.
    "xla_gpu_exclude_nondeterministic_ops": "true",
    # Sums gradients over devices during the backward pass.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}
_YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE"
CPU_FLAGS = {
    # Convolutions by oneDNN; no effect with jaxlib 0.10.
    "xla_cpu_experimental_onednn_custom_call": "true",
    # XLA's default without its INDIVIDUAL_CONVOLUTION.
    "xla_cpu_experimental_ynn_fusion_type": ",".join(_YNNPACK),
}
# Releases of jaxlib in which `CPU_FLAGS` were measured. XLA ends the process if a flag
# is unknown, and removes experimental flags without notice.
CPU_VERSIONS = ("0.10.", "0.12.")
CPU_INFO = Path("/proc/cpuinfo")


def set_flags() -> None:
    """Adds the flags for this machine's devices to XLA_FLAGS.

    Does not change flags that XLA_FLAGS already has. Has no effect after the first use
    of a device.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if any(Path(path).exists() for path in DRIVER):
        given = with_flags(given, GPU_FLAGS)
    if _is_x86_linux() and version("jaxlib").startswith(CPU_VERSIONS):
        given = with_flags(given, CPU_FLAGS)
    os.environ["XLA_FLAGS"] = given


def with_flags(given: str, flags: Mapping[str, str]) -> str:
    """Returns `given`, a value of XLA_FLAGS, plus the `flags` that it lacks."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    missing = [name for name in flags if name not in named]
    return " ".join([*given.split(), *(f"--{name}={flags[name]}" for name in missing)])


def has_fast_bfloat16() -> bool:
    """Returns whether XLA computes bfloat16 convolutions with this CPU's AMX units."""
    return (
        _is_x86_linux()
        and version("jaxlib").startswith(CPU_VERSIONS[1:])
        and " amx_bf16" in CPU_INFO.read_text(encoding="ascii", errors="ignore")
    )


def _is_x86_linux() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"
