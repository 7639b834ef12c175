"""Rendezvous of all processes before JAX starts, over one TCP port of process 0.

JAX's own start-up does not name a missing process. Here every process learns which
processes are missing, and whether all run the same program, before JAX takes the port.

A connection is admitted once it proves that it knows the run's token. Each message of
JSON is preceded by its HMAC-SHA256, which includes a random number of the receiver. The
token is never sent, recorded messages cannot be replayed, and messages from strangers
(connections that are not admitted) are not parsed:

  process 0 -> I   N0
  I -> process 0   HMAC("process" N0 message)  message: process, program, nonce NI
  process 0 -> I   HMAC("verdict" NI message)  message: missing, differing
"""

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxii.errors import InputError

# The environment variable with the run's token: any text, the same on all processes.
TOKEN = "JAXII_RUN_TOKEN"
# The key if there is no token: keeps out port scanners and other programs, but nobody
# who has this code.
_NO_TOKEN = "jaxii"
RETRY_SECONDS = 0.2
MAX_NAMED = 8
MAX_LINE_BYTES = 4096
# Open connections of strangers beyond the run's processes; the oldest is closed first.
MAX_STRANGERS = 16
_NONCE_BYTES = 16


class ProcessLost(Exception):
    """A process of the run did not start or ended; the others cannot continue."""


def wait_for_processes(
    address: str,
    index: int,
    count: int,
    program: str,
    seconds: float,
    token: str = "",
) -> None:
    """Waits until every process of the run has connected to process 0.

    Args:
      address: HOST:PORT of process 0, which listens there.
      index: Index of this process.
      count: Number of processes.
      program: Digest of code and arguments, which must be equal on all processes.
      seconds: Timeout.
      token: Secret of the run, equal on all processes; "" if there is none.

    Raises:
      ProcessLost: If a process does not connect in time, or disconnects.
      InputError: If a process runs another program or has a wrong index, or the port
        is taken.
    """
    deadline = time.monotonic() + seconds
    host, _, port = address.rpartition(":")
    key = (token or _NO_TOKEN).encode()
    verdict = (
        _Lead(count, program, key).hold(
            host if is_loopback(host) else "", int(port), deadline, seconds
        )
        if index == 0
        else _report(host, int(port), index, program, key, deadline, seconds)
    )
    if verdict["missing"]:
        raise ProcessLost(verdict["missing"])
    if verdict["differing"]:
        raise InputError(verdict["differing"])


def is_loopback(host: str) -> bool:
    """Returns whether `host` can be reached from this machine only."""
    return host in ("localhost", "127.0.0.1")


class _Peer:
    """A connection to process 0.

    Attributes:
      nonce: Random number that the HMAC of the peer's message must include.
      received: The part of the peer's line that has arrived.
      reply: Context of the reply's HMAC; empty until the peer's message arrives.
    """

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.nonce = secrets.token_hex(_NONCE_BYTES).encode()
        self.received = b""
        self.reply = b""


class _Lead:
    """Process 0: admits the others and sends them the verdict."""

    def __init__(self, count: int, program: str, key: bytes):
        self._count, self._key = count, key
        self._programs = {0: program}
        self._present: dict[int, _Peer] = {}
        self._strangers: list[_Peer] = []
        self._turned_away = 0
        self._gone: set[int] = set()
        self._selector = selectors.DefaultSelector()

    def hold(
        self, interface: str, port: int, deadline: float, seconds: float
    ) -> Mapping[str, str]:
        """Waits for all others, sends them the verdict and returns it."""
        try:
            # Strangers must not fill the queue of connections that wait for `accept`.
            backlog = self._count + socket.SOMAXCONN
            server = socket.create_server((interface, port), backlog=backlog)
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen on port {port} ({error.strerror}); use a "
                "free port in --coordinator."
            ) from error
        with server, self._selector:
            server.setblocking(False)
            self._selector.register(server, selectors.EVENT_READ)
            while len(self._present) < self._count - 1 and not self._gone:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                for key, _ in self._selector.select(left):
                    if key.data is None:
                        self._accept(server)
                    else:
                        self._hear(key.data)
            verdict = self._verdict(seconds)
            for peer in self._present.values():
                _send(peer.connection, _sealed(self._key, peer.reply, verdict))
            for peer in (*self._strangers, *self._present.values()):
                peer.connection.close()
        return verdict

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # the connection was closed meanwhile
        connection.setblocking(False)
        peer = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)
        self._strangers.append(peer)
        _send(connection, peer.nonce + b"\n")
        # All processes of the run may be strangers at the same time.
        if len(self._strangers) > self._count + MAX_STRANGERS:
            self._drop(self._strangers[0])

    def _hear(self, peer: _Peer) -> None:
        """Reads what a connection sent, and admits or drops it."""
        if peer not in self._strangers:
            # An admitted process sends nothing more, so this is its end of file.
            self._gone |= {i for i, one in self._present.items() if one is peer}
            return
        try:
            received = peer.connection.recv(MAX_LINE_BYTES)
        except OSError:
            received = b""
        peer.received += received
        line, end, _ = peer.received.partition(b"\n")
        if end:
            self._admit(peer, line)
        elif not received or len(peer.received) > MAX_LINE_BYTES:
            self._drop(peer)

    def _admit(self, peer: _Peer, line: bytes) -> None:
        hello = _opened(self._key, b"process" + peer.nonce, line)
        if hello is None:
            self._turned_away += 1
            self._drop(peer)
            return
        index: int = hello["process"]
        peer.reply = b"verdict" + hello["nonce"].encode()
        if not 0 < index < self._count or index in self._present:
            problem = (
                f"--process_id={index} is already in use or out of range for "
                f"{self._count} processes; give every process a different --process_id."
            )
            refusal = {"missing": "", "differing": problem}
            _send(peer.connection, _sealed(self._key, peer.reply, refusal))
            self._drop(peer)
            return
        self._strangers.remove(peer)
        self._present[index] = peer
        self._programs[index] = hello["program"]

    def _drop(self, peer: _Peer) -> None:
        self._strangers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _verdict(self, seconds: float) -> dict[str, str]:
        missing = set(range(1, self._count)) - set(self._present)
        total = f"of {self._count}"
        others = {i for i, one in self._programs.items() if one != self._programs[0]}
        text = {"missing": "", "differing": ""}
        if self._gone:
            text["missing"] = (
                f"{_names(self._gone)} {total} exited during start-up; see the logs"
            )
        elif missing:
            text["missing"] = (
                f"{_names(missing)} {total} did not connect within {seconds:.0f} s; "
                "see the logs, or increase --start_timeout_seconds"
            )
            if self._turned_away:
                text["missing"] += (
                    f"; connections with another {TOKEN}: {self._turned_away}"
                )
        elif others:
            text["differing"] = (
                f"{_names(others)} {total}: the code or the flags differ from those of "
                "process 0; start all processes with the same revision and flags."
            )
        return text


def _names(indices: set[int]) -> str:
    chosen = sorted(indices)
    shown = ", ".join(map(str, chosen[:MAX_NAMED]))
    more = f" and {len(chosen) - MAX_NAMED} more" if len(chosen) > MAX_NAMED else ""
    return f"process{'es' if len(chosen) > 1 else ''} {shown}{more}"


def _report(
    host: str,
    port: int,
    index: int,
    program: str,
    key: bytes,
    deadline: float,
    seconds: float,
) -> Mapping[str, str]:
    """Reports this process to process 0 and returns the verdict on all."""
    where = f"process 0, the coordinator at {host}:{port},"
    mine = secrets.token_hex(_NONCE_BYTES)
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = socket.create_connection((host, port), timeout=left)
        except OSError:
            time.sleep(min(RETRY_SECONDS, left))
            continue
        with peer:
            challenge = _line(peer, deadline)
            if len(challenge) != 2 * _NONCE_BYTES:
                # A tunnel accepts connections before process 0 does.
                time.sleep(RETRY_SECONDS)
                continue
            hello = {"process": index, "program": program, "nonce": mine}
            _send(peer, _sealed(key, b"process" + challenge, hello))
            # Process 0 may have started later; it then times out after this process.
            line = _line(peer, deadline + seconds)
            return _opened(key, b"verdict" + mine.encode(), line) or {
                "missing": f"{where} exited during start-up or has another {TOKEN}; "
                "see its log"
            }
    return {"missing": f"{where} did not answer within {seconds:.0f} s"}


def _sealed(key: bytes, context: bytes, message: Mapping[str, object]) -> bytes:
    """Returns a message as a line that starts with its HMAC."""
    text = json.dumps(message).encode()
    return _proof(key, context, text) + b" " + text + b"\n"


def _opened(key: bytes, context: bytes, line: bytes) -> dict[str, Any] | None:
    """Returns the message of a line; None if its HMAC is wrong."""
    proof, _, text = line.partition(b" ")
    if not hmac.compare_digest(proof, _proof(key, context, text)):
        return None
    return json.loads(text)


def _proof(key: bytes, context: bytes, text: bytes) -> bytes:
    return hmac.digest(key, context + text, "sha256").hex().encode()


def _line(peer: socket.socket, deadline: float) -> bytes:
    """Returns the next line, without its end; b"" if none comes in time."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) <= MAX_LINE_BYTES:
            peer.settimeout(max(deadline - time.monotonic(), 1e-3))
            if not (more := peer.recv(MAX_LINE_BYTES)):
                return b""
            received += more
        return received.rstrip(b"\n")
    return b""


def _send(peer: socket.socket, line: bytes) -> None:
    # Errors are ignored: reading detects a closed connection.
    with contextlib.suppress(OSError):
        peer.sendall(line)
