"""Sets up JAX for a command: compiled programs, devices, and several processes."""

import contextlib
import os
import sys
import warnings
from pathlib import Path

from jaxii import console
from jaxii.cli.flags import Flags
from jaxii.distributed import cluster, gpu
from jaxii.errors import InputError
from jaxii.storage import user_cache

# JAX's own variable; if it is set but empty, no program is kept.
CACHE = "JAX_COMPILATION_CACHE_DIR"


def declare_processes(flags: Flags) -> None:
    """Declares the flags that make several processes one run."""
    flags.paragraph(
        "Several processes can form one run. On Cloud TPU, on TPUs of Kubernetes and "
        "under srun, they detect the cluster. Elsewhere, pass these flags to each "
        "process, and set JAXII_RUN_TOKEN to the same random text on all processes to "
        "exclude other connections:"
    )
    flags.text("coordinator", "HOST:PORT", "address on which process 0 listens")
    flags.integer("num_processes", "N", "number of processes", at_least=1)
    flags.integer("process_id", "I", "index of this process, from 0", at_least=0)
    flags.integer(
        "start_timeout_seconds",
        "SECONDS",
        "how long to wait for all processes at the start",
        default=60,
        at_least=1,
    )


def start_jax(flags: Flags, *, saves_on_sigterm: bool = False) -> None:
    """Prepares for JAX; with several processes, waits for the others.

    Call after all flags are checked, because importing JAX takes seconds.

    Args:
      saves_on_sigterm: Whether the command calls `processes.preemption_notice`.

    Raises:
      InputError: If the flags of the processes do not fit together, or another
        process runs another command or other code.
    """
    keep_compiled_programs()
    gpu.set_flags()
    flags.place = _place(flags)
    if flags.place is not None:
        from jaxii.distributed import processes

        processes.join(
            flags.place,
            sys.argv,
            flags.start_timeout_seconds,
            saves_on_sigterm=saves_on_sigterm,
        )


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache, or where `CACHE` says.

    Turns off the warnings about programs that JAX cannot keep, such as those of
    `models.cpu.compiler_options`. Does nothing if the folder cannot be written. JAX
    runs the programs in the folder, so a folder that others can write to is not used.
    """
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    given = os.environ.get(CACHE)
    if given == "" or "://" in (given or ""):
        return
    with contextlib.suppress(OSError, InputError):
        folder = Path(given or user_cache() / "compiled")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        # The sticky bit does not help: the names of programs can be predicted.
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            console.warn(
                f"{folder} is not used for compiled programs, because others can write "
                f"to it; run chmod go-w {folder} if it is yours, or set {CACHE} to "
                "another folder."
            )
            os.environ[CACHE] = ""
        elif given is None and os.access(folder, os.W_OK):
            os.environ[CACHE] = str(folder)


def _place(flags: Flags) -> cluster.ProcessInfo | None:
    if "coordinator" not in flags.values:
        return None
    index = -1 if flags.process_id is None else flags.process_id
    place = cluster.from_flags(flags.coordinator, flags.num_processes or 0, index)
    return place or cluster.detected()
