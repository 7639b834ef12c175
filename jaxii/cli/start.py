"""Sets up JAX for a command: compiled programs, GPU flags, and several processes."""

import contextlib
import os
import sys

from jaxii.cli.flags import Flags
from jaxii.distributed import cluster, gpu
from jaxii.storage import user_cache

# JAX's own variable; if it is set but empty, no program is kept.
CACHE = "JAX_COMPILATION_CACHE_DIR"


def declare_processes(flags: Flags) -> None:
    """Declares the flags that make several processes one run."""
    flags.paragraph(
        "Several processes form one run. On Cloud TPU, on TPUs of Kubernetes and under "
        "srun they find one another; elsewhere, give each process:"
    )
    flags.text("coordinator", "HOST:PORT", "where process 0 listens")
    flags.integer("num_processes", "N", "number of processes", at_least=1)
    flags.integer("process_id", "I", "index of this process, from 0", at_least=0)
    flags.integer(
        "start_timeout_seconds",
        "SECONDS",
        "how long the processes wait for one another at the start",
        default=60,
        at_least=1,
    )


def start_jax(flags: Flags) -> None:
    """Prepares for JAX; with several processes, waits for the others.

    Call when the flags are known to be usable: importing JAX takes seconds.

    Raises:
      InputError: If the flags of the processes do not fit together, or another
        process runs another command or other code.
    """
    keep_compiled_programs()
    gpu.set_flags()
    flags.place = _place(flags)
    if flags.place is not None:
        from jaxii.distributed import processes

        processes.join(flags.place, sys.argv, flags.start_timeout_seconds)


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache, unless `CACHE` is set.

    Does nothing where the folder cannot be written: JAX would warn of every program.
    """
    if CACHE in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = user_cache() / "compiled"
        # These programs are executed: nobody else may write here.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[CACHE] = str(folder)


def _place(flags: Flags) -> cluster.ProcessInfo | None:
    if "coordinator" not in flags.values:
        return None
    index = -1 if flags.process_id is None else flags.process_id
    place = cluster.from_flags(flags.coordinator, flags.num_processes or 0, index)
    return place or cluster.detected()
