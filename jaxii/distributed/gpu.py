"""XLA flags for NVIDIA GPUs.

Other modules make the remaining choices for GPUs. Convolutions are NHWC
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
"""

import os
from pathlib import Path

# Files that the driver creates: on Linux, in containers, in WSL.
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
FLAGS = {
    # Excludes kernels whose sums depend on the order in which threads finish, so that
    # repeated and resumed runs are equal bit for bit.
    "xla_gpu_exclude_nondeterministic_ops": "true",
    # Sums gradients over devices during the backward pass.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}


def set_flags() -> None:
    """Adds `FLAGS` to XLA_FLAGS if there is an NVIDIA GPU.

    Does not change flags that XLA_FLAGS already has. Has no effect after the first use
    of a device.
    """
    if any(Path(path).exists() for path in DRIVER):
        os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""))


def with_flags(given: str) -> str:
    """Returns `given`, a value of XLA_FLAGS, plus the `FLAGS` that it lacks."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    missing = [name for name in FLAGS if name not in named]
    return " ".join([*given.split(), *(f"--{name}={FLAGS[name]}" for name in missing)])
