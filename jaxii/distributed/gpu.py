"""XLA's flags on NVIDIA GPUs, and where else a choice is made for them.

Convolutions are NHWC in the program (`models.layers.convolve`), the layout that cuDNN's
tensor cores read. The train step reuses the buffers of the state that it is given
(`train.step.make_train_step`). The loop dispatches ahead of the device
(`train.trainer.STEPS_AHEAD`), so that batches are copied while a step runs. Both ways
between host and GPU go through pinned memory, which the GPU reads and writes by itself:
XLA stages batches in buffers of its own, and Orbax moves what a checkpoint saves to
memory of the kind `pinned_host` (`train.checkpoint_manager`).

The rest is XLA's default: command buffers (CUDA graphs) are on, and each convolution
and matrix product is the fastest of those that XLA times when it compiles
(`xla_gpu_autotune_level`). The choice is kept with the compiled program in the folder
of `cli.start.CACHE`, so a run that continues on the same machine runs the same kernels.
Where it must be the same run on another machine, share that folder, or set
XLA_FLAGS=--xla_gpu_deterministic_ops=true, which times nothing and is slower.
"""

import os
from pathlib import Path

# What the driver makes: on Linux, in containers, in WSL.
DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
FLAGS = {
    # No kernel whose sums depend on the order in which threads finish: a run that is
    # repeated, or continued, is equal bit for bit.
    "xla_gpu_exclude_nondeterministic_ops": "true",
    # Sums gradients over devices while the backward pass goes on.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}


def set_flags() -> None:
    """Adds `FLAGS` to XLA_FLAGS if there is an NVIDIA GPU.

    Flags that XLA_FLAGS already has stay as they are. Has no effect after the first
    use of a device.
    """
    if any(Path(path).exists() for path in DRIVER):
        os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""))


def with_flags(given: str) -> str:
    """Returns a value of XLA_FLAGS with those of `FLAGS` that it does not have."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    missing = [name for name in FLAGS if name not in named]
    return " ".join([*given.split(), *(f"--{name}={FLAGS[name]}" for name in missing)])
