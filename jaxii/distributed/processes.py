"""Starts, synchronises and ends a run of several processes.

Call `join` before the first use of a device. Every process then runs the same program;
only the lead process writes text.
"""

import contextlib
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxii import console
from jaxii.distributed import rendezvous
from jaxii.distributed.cluster import ProcessInfo
from jaxii.errors import InputError

# A process without a heartbeat for this long is lost, and the others stop.
HEARTBEAT_SECONDS = 30
# JAX ends all processes if one enters the shutdown this long after the first.
SHUTDOWN_SECONDS = 20
# Longest wait for the others before the shutdown; a lost process ends it earlier.
LEAVE_SECONDS = 24 * 3600
# The same after invalid input, which often ends all processes, but not always.
MISUSED_SECONDS = 5
# Name of the variable with the file to create if a process ends with 2.
MISUSED_FILE = "JAXII_MISUSED_FILE"
# Flags that may differ between the processes of a run.
OWN_FLAGS = ("process_id",)


def join(
    place: ProcessInfo,
    argv: Sequence[str],
    timeout_seconds: int,
    *,
    saves_on_sigterm: bool = False,
) -> None:
    """Joins a run of several processes; returns when all have started.

    Args:
      place: Address and index of this process.
      argv: The command line, which must be the same on all processes.
      timeout_seconds: Longest wait for the others.
      saves_on_sigterm: Whether the program calls `preemption_notice`; if not, SIGTERM
        ends the process.

    Raises:
      ProcessLost: If processes do not start; names them.
      InputError: If processes run different programs.
    """
    process = place.coordinator, place.index, place.count
    token = os.environ.get(rendezvous.TOKEN, "")
    rendezvous.wait_for_processes(*process, _program(argv), timeout_seconds, token)
    is_local = rendezvous.is_loopback(place.coordinator.rpartition(":")[0])
    # The service replaces the handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        # JAX's service has no authentication and listens on all interfaces by default.
        coordinator_bind_address=place.coordinator if is_local else None,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    _connect_devices()
    if not is_lead():
        console.mute()


def _connect_devices() -> None:
    """Runs a first all-reduce while all processes are at the same point.

    CPUs wait at most 30 s for each other in their first collective. Otherwise that is
    in the first train step, which some processes may take longer to compile.
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
    words = iter(argv[1:])
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if not word.startswith("-") or name not in OWN_FLAGS:
            # With its end, so that two words differ from one.
            digest.update(word.encode(errors="surrogateescape") + b"\0")
        elif not equals:
            next(words, None)
    return digest.hexdigest()


def is_lead() -> bool:
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has called this.

    Args:
      what: Name of the barrier; the same on all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(digest: str, problem: str) -> None:
    """Checks that all processes hold the same content.

    Args:
      digest: Hexadecimal digest, of the same length on all processes.
      problem: Start of the error message, which names the difference.

    Raises:
      InputError: On every process, if the digests differ.
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
            "use the same on all processes."
        )


def check_on_lead(check: Callable[[], None]) -> None:
    """Runs a check on the lead process; raises on every process if it fails.

    Raises:
      InputError: On every process; the error on the lead process names the reason.
    """
    refusal: InputError | None = None
    if is_lead():
        try:
            check()
        except InputError as error:
            refusal = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(refusal is not None))
        if failed and refusal is None:
            raise InputError("process 0 refused to start; see its output.")
    if refusal is not None:
        raise refusal


def preemption_notice() -> Callable[[int], bool]:
    """Turns SIGTERM or Ctrl-C into a request to save and stop.

    With several processes, `join` needs `saves_on_sigterm`.

    Returns:
      `should_stop(step)`, to be called after every step and after every batch of the
      final evaluation: whether to save and stop. With several processes it is true on
      all of them from the same call on, after one of them received a signal or the
      maintenance notice of a Cloud TPU.
    """
    if jax.process_count() > 1:
        # JAX's coordination service handles SIGTERM and notifies every process.
        signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        return _common_stop()
    received = []

    def receive(signum, frame):
        if received:
            signal.default_int_handler(signum, frame)
        received.append(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return lambda step: bool(received)


def _common_stop() -> Callable[[int], bool]:
    """Returns `should_stop` for several processes, which must call it equally often.

    After a notice, JAX agrees on the largest number that a process has passed so far
    (0 before the first call) plus one, and returns True for that number only. Numbers
    must therefore be consecutive from 1; steps of a resumed run are not.
    """
    calls = itertools.count(1)
    stop = False

    def should_stop(step: int) -> bool:
        nonlocal stop
        stop = stop or multihost_utils.reached_preemption_sync_point(next(calls))
        return stop

    return should_stop


def failure(place: ProcessInfo, error: Exception) -> str:
    """Returns the message for an error on one of several processes."""
    reason = str(error).partition("\n")[0][:200] or type(error).__name__
    return (
        f"process {place.index} of {place.count} failed ({reason}); if the other logs "
        "show no other error, one of the other processes has died. Run the same "
        "command on all processes to continue from the last complete checkpoint."
    )


def leave(code: int) -> None:
    """Disconnects from the other processes; exits at once if disconnecting fails.

    Args:
      code: The exit code. With 0 and 75, it waits until the others have finished their
        work, such as an upload. With 1 (this process failed alone or lost another), it
        does not wait. With 2 (invalid input), it waits `MISUSED_SECONDS`.
    """
    if code == 2 and os.environ.get(MISUSED_FILE):
        with contextlib.suppress(OSError):
            Path(os.environ[MISUSED_FILE]).touch()
    # Asking JAX for its processes would start the devices, which may wait for a process
    # that did not come.
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 1:
        os._exit(code)
    seconds = MISUSED_SECONDS if code == 2 else LEAVE_SECONDS
    try:
        # Unlike the shutdown, this barrier raises an error if it fails.
        ocp.multihost.get_barrier_sync_fn()(key="leave", timeout_ms=seconds * 1000)
        jax.distributed.shutdown()
    except RuntimeError:
        os._exit(code)
