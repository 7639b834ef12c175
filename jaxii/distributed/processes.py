"""Several processes as one run: how they come together, agree, and part.

`main` calls `join` before anything touches a device. Afterwards every process runs the
same program; what only one may do (writing text, telling a person) is for the lead.
"""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxii import console
from jaxii.distributed import rendezvous
from jaxii.distributed.cluster import ProcessInfo
from jaxii.distributed.rendezvous import Lost as Lost
from jaxii.errors import InputError

# A process that has not been heard of for so long is lost, and the others stop.
HEARTBEAT_SECONDS = 30
SHUTDOWN_SECONDS = 20
# What may differ between the processes of a run.
OWN_FLAGS = ("--process_id",)


def join(place: ProcessInfo, argv: Sequence[str], timeout_seconds: int) -> None:
    """Makes this process one of several of a run; returns when all are there.

    Args:
      place: which one it is.
      argv: the command line, which has to be the same everywhere.
      timeout_seconds: how long to wait for the others.

    Raises:
      roll_call.Lost: some did not come; says which.
      InputError: some run another program.
    """
    address, index = place.coordinator, place.index
    rendezvous.hold(address, index, place.count, _program(argv), timeout_seconds)
    jax.distributed.initialize(
        address,
        place.count,
        index,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    _connect_devices()
    if not is_lead():
        console.mute()


def _connect_devices() -> None:
    """Adds up one number of every device, while all processes are at the same point.

    CPUs give each other 30 s to come to their first exchange. That would be the first
    train step, which one process may take longer to compile than another.
    """
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.float32)
    )
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(ones)
    total.block_until_ready()


def _program(argv: Sequence[str]) -> str:
    """Returns a digest of the code, its libraries and its arguments."""
    digest = hashlib.sha256(jax.__version__.encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for word in argv[1:]:
        if not word.startswith(OWN_FLAGS):
            digest.update(word.encode())
    return digest.hexdigest()


def is_lead() -> bool:
    """Says whether this process writes text and tells a person."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process is here; nothing to wait for with one.

    Args:
      what: has been done, in words; the same everywhere.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(digest: str, problem: str) -> None:
    """Refuses to go on where processes hold different content.

    Args:
      digest: of the content, hexadecimal, of the same length everywhere.
      problem: what is different, in words.

    Raises:
      InputError: on every process.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    others = [
        found.tobytes().hex() for found in multihost_utils.process_allgather(mine)
    ]
    if set(others) != {digest}:
        places = [i for i, found in enumerate(others) if found != others[0]]
        raise InputError(
            f"{problem} on process {', '.join(map(str, places))} than on process 0; "
            "give every process the same."
        )


def check_on_lead(check: Callable[[], None]) -> None:
    """Refuses on every process what the lead process refuses.

    Args:
      check: is called by the lead process alone.

    Raises:
      InputError: on every process; the lead's says why.
    """
    refused: InputError | None = None
    if is_lead():
        try:
            check()
        except InputError as error:
            refused = error
    if jax.process_count() > 1:
        told = multihost_utils.broadcast_one_to_all(np.int32(refused is not None))
        if told and refused is None:
            raise InputError("process 0 refuses to start; its output says why.")
    if refused is not None:
        raise refused


def wanted_back() -> Callable[[int], bool]:
    """Turns SIGTERM or Ctrl-C into a request to save and leave.

    Returns:
      A function of the step, to be called after every one: whether to save and leave.
      With several processes it is true on all of them at the same step, after any of
      them was asked (by a signal, or by the maintenance notice of a Cloud TPU).
    """
    if jax.process_count() > 1:
        # JAX's coordination service has its own handler of SIGTERM: it tells everyone.
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        return multihost_utils.reached_preemption_sync_point
    asked = []

    def ask(signum, frame):
        if asked:
            signal.default_int_handler(signum, frame)
        asked.append(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return lambda step: bool(asked)


def failure(place: ProcessInfo, error: Exception) -> str:
    """Returns what an error on one of several processes most likely means."""
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return (
        f"process {place.index} of {place.count} failed ({reason}); if the logs of the "
        "others say no more, one of them is gone. The same command on all processes "
        "goes on from the last complete checkpoint."
    )


def leave(code: int) -> None:
    """Parts from the others at the end; ends this process where they cannot.

    Args:
      code: the exit code; of a process that failed alone, or lost another, nobody is
        waited for.
    """
    if jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 1:
        os._exit(code)
    try:
        jax.distributed.shutdown()
    except RuntimeError:
        os._exit(code)
