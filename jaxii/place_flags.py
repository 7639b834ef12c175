"""The flags that say which process of several this one is.

Read by `main`, beside `arguments`; `clusters` finds the place where no flag says it.
"""

from absl import flags

from jaxii.distributed import cluster
from jaxii.errors import InputError

_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "In all.", lower_bound=0)
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "From 0.", lower_bound=-1)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_seconds", 60, "Seconds.", lower_bound=1
)
# The commands that several processes can run as one.
TOGETHER = ("train", "evaluate", "hold_out", "adapt", "predict")


def place_of(command: str) -> cluster.Place | None:
    """Returns which process of several this one is; None where it is the only one.

    Raises:
      InputError: flags that do not fit together, or a command that runs alone.
    """
    place = cluster.from_flags(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    if command in TOGETHER:
        return place or cluster.detected()
    if place is not None:
        raise InputError(
            f"{command} runs in one process; --coordinator, --num_processes and "
            f"--process_id are for {', '.join(TOGETHER)}."
        )
    return None


def start_timeout() -> int:
    """Returns how many seconds the processes of a run wait for one another."""
    return _START_TIMEOUT.value
