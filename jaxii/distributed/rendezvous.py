"""The roll that process 0 calls before a run of several starts, over one TCP port.

JAX's own start-up ends a process without a word on who was missing; here everyone
learns it, and that all run the same program, before JAX takes over the port.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Mapping

from jaxii.errors import InputError

RETRY_SECONDS = 0.2
MOST_NAMED = 8
BYTES = 1 << 16


class Lost(Exception):
    """A process of the run did not come, or went; the others cannot go on."""


def hold(address: str, index: int, count: int, program: str, seconds: float) -> None:
    """Takes part in the roll call; returns when every process is there.

    Args:
      address: HOST:PORT of process 0, which listens there.
      index: of this process.
      count: processes in all.
      program: what has to be the same everywhere: code and arguments, in a digest.
      seconds: how long to wait.

    Raises:
      Lost: a process did not come in time, or came and went.
      InputError: a process runs another program, or the port is taken.
    """
    deadline = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    verdict = (
        _call(int(port), count, program, deadline, seconds)
        if index == 0
        else _answer(host, int(port), index, program, deadline, seconds)
    )
    if verdict["missing"]:
        raise Lost(verdict["missing"])
    if verdict["differing"]:
        raise InputError(verdict["differing"])


def _call(
    port: int, count: int, program: str, deadline: float, seconds: float
) -> Mapping[str, str]:
    """Waits for all others, tells them the verdict and returns it."""
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
            # Whoever waits for the verdict says nothing; end of file is its end.
            gone = {i for i, peer in present.items() if peer in ready}
        verdict = _verdict(set(range(1, count)) - set(present), gone, programs, seconds)
        for peer in present.values():
            _send(peer, verdict)
            peer.close()
    return verdict


def _admit(server, present, programs, count) -> None:
    peer, _ = server.accept()
    peer.settimeout(5.0)
    try:
        said = json.loads(peer.makefile("r").readline())
        index = int(said["process"])
    except (OSError, ValueError, KeyError, TypeError):
        # A port scanner; a process that is meant would try again.
        peer.close()
        return
    if not 0 < index < count or index in present:
        _send(
            peer,
            {
                "missing": "",
                "differing": f"--process_id={index} of {count} is there already or not "
                "one of them; give every process its own number.",
            },
        )
        peer.close()
        return
    present[index] = peer
    programs[index] = said["program"]


def _verdict(missing, gone, programs, seconds) -> dict[str, str]:
    of, log = f"of {len(programs) + len(missing)}", "see its log"
    others = [i for i in sorted(programs) if programs[i] != programs[0]]
    text = {"missing": "", "differing": ""}
    if gone:
        text["missing"] = f"{_names(gone)} {of} ended during start-up; {log}"
    elif missing:
        text["missing"] = (
            f"{_names(missing)} {of} did not come within {seconds:.0f} s; {log}, or "
            "wait longer with --start_timeout_seconds"
        )
    elif others:
        text["differing"] = (
            f"{_names(others)} {of} runs another version of the code or other "
            "flags than process 0; start the same revision and flags everywhere."
        )
    return text


def _names(indices) -> str:
    chosen = sorted(indices)
    shown = ", ".join(map(str, chosen[:MOST_NAMED]))
    more = f" and {len(chosen) - MOST_NAMED} more" if len(chosen) > MOST_NAMED else ""
    return f"process{'es' if len(chosen) > 1 else ''} {shown}{more}"


def _answer(
    host: str, port: int, index: int, program: str, deadline: float, seconds: float
) -> Mapping[str, str]:
    """Says that this process is there and returns the verdict on all."""
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
        # It decides when time is up; a little later than here, if it began later.
        peer.settimeout(max(deadline - time.monotonic(), 0.0) + seconds)
        try:
            return json.loads(peer.makefile("r").readline())
        except (OSError, ValueError):
            return {"missing": f"{where} ended during start-up; see its log"}


def _send(peer: socket.socket, said: Mapping[str, object]) -> None:
    # Where it is gone, whoever waits for it will notice.
    with contextlib.suppress(OSError):
        peer.sendall((json.dumps(said) + "\n").encode())
