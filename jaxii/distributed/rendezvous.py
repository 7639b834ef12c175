"""Rendezvous of all processes before JAX starts, over one TCP port of process 0.

JAX's own start-up does not name a missing process. Here every process learns which one
is missing, and that all run the same program, before JAX takes over the port.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping

from jaxii.errors import InputError

RETRY_SECONDS = 0.2
MAX_NAMED = 8


class ProcessLost(Exception):
    """A process of the run did not start or ended; the others cannot continue."""


def wait_for_processes(
    address: str, index: int, count: int, program: str, seconds: float
) -> None:
    """Waits until every process of the run has connected to process 0.

    Args:
      address: HOST:PORT of process 0, which listens there.
      index: Index of this process.
      count: Number of processes.
      program: Digest of code and arguments, which must be equal on all processes.
      seconds: Timeout.

    Raises:
      ProcessLost: If a process does not connect in time, or disconnects.
      InputError: If a process runs another program, or the port is taken.
    """
    deadline = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    verdict = (
        _lead(int(port), count, program, deadline, seconds)
        if index == 0
        else _report(host, int(port), index, program, deadline, seconds)
    )
    if verdict["missing"]:
        raise ProcessLost(verdict["missing"])
    if verdict["differing"]:
        raise InputError(verdict["differing"])


def _lead(
    port: int, count: int, program: str, deadline: float, seconds: float
) -> Mapping[str, str]:
    """Waits for all others, sends them the verdict and returns it."""
    try:
        server = socket.create_server(("", port), backlog=count)
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); give a free "
            "one in --coordinator."
        ) from error
    present: dict[int, socket.socket] = {}
    programs = {0: program}
    with server:
        gone: set[int] = set()
        while len(present) < count - 1 and not gone and time.monotonic() < deadline:
            ready, _, _ = select.select([server, *present.values()], [], [], 0.5)
            if server in ready:
                _admit(server, present, programs, count)
            # A waiting process sends nothing; a readable socket is its end of file.
            gone = {i for i, peer in present.items() if peer in ready}
        verdict = _verdict(set(range(1, count)) - set(present), gone, programs, seconds)
        for peer in present.values():
            _send(peer, verdict)
            peer.close()
    return verdict


def _admit(
    server: socket.socket,
    present: dict[int, socket.socket],
    programs: dict[int, str],
    count: int,
) -> None:
    peer, _ = server.accept()
    peer.settimeout(5.0)
    try:
        hello = json.loads(peer.makefile("r").readline())
        index = int(hello["process"])
    except (OSError, ValueError, KeyError, TypeError):
        # A port scanner; a process of the run would try again.
        peer.close()
        return
    if not 0 < index < count or index in present:
        problem = (
            f"--process_id={index} of {count} is already connected or out of range; "
            "give every process its own number."
        )
        _send(peer, {"missing": "", "differing": problem})
        peer.close()
        return
    present[index] = peer
    programs[index] = hello["program"]


def _verdict(
    missing: set[int], gone: set[int], programs: Mapping[int, str], seconds: float
) -> dict[str, str]:
    total = f"of {len(programs) + len(missing)}"
    others = {i for i in programs if programs[i] != programs[0]}
    text = {"missing": "", "differing": ""}
    if gone:
        text["missing"] = f"{_names(gone)} {total} ended during start-up; see its log"
    elif missing:
        text["missing"] = (
            f"{_names(missing)} {total} did not come within {seconds:.0f} s; see its "
            "log, or wait longer with --start_timeout_seconds"
        )
    elif others:
        text["differing"] = (
            f"{_names(others)} {total} runs another version of the code or other "
            "flags than process 0; start the same revision and flags everywhere."
        )
    return text


def _names(indices: set[int]) -> str:
    chosen = sorted(indices)
    shown = ", ".join(map(str, chosen[:MAX_NAMED]))
    more = f" and {len(chosen) - MAX_NAMED} more" if len(chosen) > MAX_NAMED else ""
    return f"process{'es' if len(chosen) > 1 else ''} {shown}{more}"


def _report(
    host: str, port: int, index: int, program: str, deadline: float, seconds: float
) -> Mapping[str, str]:
    """Reports this process to process 0 and returns the verdict on all."""
    where = f"process 0, the coordinator at {host}:{port},"
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return {"missing": f"{where} did not answer within {seconds:.0f} s"}
        try:
            peer = socket.create_connection((host, port), timeout=left)
            break
        except OSError:
            time.sleep(min(RETRY_SECONDS, left))
    with peer:
        _send(peer, {"process": index, "program": program})
        # Process 0 may have started later, and times out later than this process.
        peer.settimeout(max(deadline - time.monotonic(), 0.0) + seconds)
        try:
            return json.loads(peer.makefile("r").readline())
        except (OSError, ValueError):
            return {"missing": f"{where} ended during start-up; see its log"}


def _send(peer: socket.socket, message: Mapping[str, object]) -> None:
    # A closed connection is noticed by whoever waits for that process.
    with contextlib.suppress(OSError):
        peer.sendall((json.dumps(message) + "\n").encode())
