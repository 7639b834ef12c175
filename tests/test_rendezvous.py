"""Tests the rendezvous over loopback: every process names the missing ones."""

import contextlib
import selectors
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxii.distributed import rendezvous
from jaxii.distributed.rendezvous import TOKEN, ProcessLost, wait_for_processes
from jaxii.errors import InputError


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def connected(port):
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def attend(indices, count, *, programs=None, seconds=1.0, port=None, token=""):
    """Holds a rendezvous of some processes; returns the error of each."""
    address = f"127.0.0.1:{port or free_port()}"

    def one(index):
        program = (programs or {}).get(index, "same")
        try:
            wait_for_processes(address, index, count, program, seconds, token)
        except (ProcessLost, InputError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(indices)) as pool:
        return dict(zip(indices, pool.map(one, indices), strict=True))


def test_all_who_are_there_go_on():
    assert attend([0, 1, 2, 3], 4, seconds=20) == dict.fromkeys(range(4))


def test_everyone_learns_who_is_missing():
    told = attend([0, 1, 3], 5)
    for error in told.values():
        assert isinstance(error, ProcessLost)
        assert "processes 2, 4 of 5 did not connect within 1 s" in str(error)


def test_without_process_0_the_others_say_so():
    told = attend([1, 2], 3, seconds=0.5)
    for error in told.values():
        assert "process 0, the coordinator at 127.0.0.1" in str(error)
        assert "did not answer" in str(error)


def test_a_process_with_another_program_is_named():
    told = attend([0, 1, 2], 3, programs={2: "other"}, seconds=20)
    for error in told.values():
        assert isinstance(error, InputError)
        assert str(error).startswith("process 2 of 3: the code or the flags differ")


def test_one_that_ends_while_others_wait_is_named_at_once():
    port = free_port()
    start = time.monotonic()

    def come_and_go():
        with connected(port) as peer:
            hello = {"process": 1, "program": "same", "nonce": "mine"}
            context = b"process" + peer.recv(99).strip()
            peer.sendall(rendezvous._sealed(b"jaxii", context, hello))
            time.sleep(0.3)

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    told = attend([0], 3, seconds=30, port=port)
    visitor.join()
    assert "process 1 of 3 exited during start-up" in str(told[0])
    assert time.monotonic() - start < 20


def test_a_number_given_twice_is_refused():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        lead = pool.submit(attend, [0], 3, seconds=3, port=port)
        twins = pool.submit(attend, [1], 3, seconds=3, port=port)
        time.sleep(1.0)
        again = attend([1], 3, seconds=3, port=port)[1]
        assert isinstance(again, InputError)
        assert "a different --process_id" in str(again)
        assert "process 2 of 3 did not connect" in str(lead.result()[0])
        assert "process 2 of 3 did not connect" in str(twins.result()[1])


def test_a_port_that_is_taken_is_an_error_that_says_so():
    with socket.create_server(("", 0)) as taken:
        told = attend([0], 2, port=taken.getsockname()[1])
    assert isinstance(told[0], InputError)
    assert "--coordinator" in str(told[0])


def test_all_who_know_the_token_go_on():
    assert attend([0, 1, 2], 3, seconds=20, token="x") == dict.fromkeys(range(3))


def test_a_process_with_another_token_is_not_counted_and_both_sides_say_why():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, port=port, token="right")
        told = attend([1], 2, port=port, token="wrong")[1]
        missed = str(lead.result()[0])
    assert isinstance(told, ProcessLost)
    assert f"has another {TOKEN}" in str(told)
    assert "process 1 of 2 did not connect within 1 s" in missed
    assert f"connections with another {TOKEN}: 1" in missed


def test_a_stranger_that_says_it_is_process_1_does_not_stand_in_for_it():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port, token="right")
        assert isinstance(attend([1], 2, port=port)[1], ProcessLost)
        assert attend([1], 2, seconds=20, port=port, token="right") == {1: None}
        assert lead.result() == {0: None}


def test_a_recorded_process_is_not_counted_again_and_tells_no_token():
    port, between = free_port(), free_port()
    said = []
    with ThreadPoolExecutor(2) as pool, socket.create_server(("", between)) as server:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port, token="secret")
        process = pool.submit(attend, [1], 2, seconds=20, port=between, token="secret")
        inner, outer = server.accept()[0], connected(port)
        with inner, outer, selectors.DefaultSelector() as ready:
            ready.register(inner, selectors.EVENT_READ, outer)
            ready.register(outer, selectors.EVENT_READ, inner)
            while not process.done():
                for key, _ in ready.select(0.1):
                    data = key.fileobj.recv(4096)
                    said.append((key.fileobj is inner, data))
                    key.data.sendall(data)
        assert lead.result() == {0: None}
    recording = b"".join(data for is_process, data in said if is_process)
    assert recording.count(b"\n") == 1
    assert b"secret" not in b"".join(data for _, data in said)
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=0.5, port=port, token="secret")
        with connected(port) as peer:
            peer.sendall(recording)
            assert "process 1 of 2 did not connect" in str(lead.result()[0])


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process": 1, "program": "same"}\n',
        b"0" * 64 + b' {"process": 1, "program": "same", "nonce": ""}\n',
        b"\xff\x00\xe9 " + b"[" * 4000 + b"\n",
        b"a" * 4_000_000,
    ],
    ids=["nothing", "no word", "HTTP", "no proof", "a false proof", "bytes", "endless"],
)
def test_whoever_says_nonsense_is_not_counted_and_delays_nobody(said):
    port = free_port()
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port)
        with connected(port) as peer:
            with contextlib.suppress(ConnectionError):  # the peer hangs up
                peer.sendall(said)
            assert attend([1], 2, seconds=20, port=port) == {1: None}
            assert lead.result() == {0: None}
    assert time.monotonic() - start < 10


def send_megabytes(peer):
    for _ in range(100):
        peer.sendall(b"a" * 100_000)


def test_a_line_without_end_is_hung_up_on_by_either_side():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port)
        with connected(port) as peer, pytest.raises(ConnectionError):
            send_megabytes(peer)
        assert attend([1], 2, seconds=20, port=port) == {1: None}
        assert lead.result() == {0: None}
    with ThreadPoolExecutor(1) as pool, socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        process = pool.submit(attend, [1], 2, seconds=0.5, port=port)
        with server.accept()[0] as peer, pytest.raises(ConnectionError):
            send_megabytes(peer)
        server.close()
        assert isinstance(process.result()[1], ProcessLost)


def test_a_stranger_that_hangs_up_is_forgotten():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port)
        with connected(port) as peer, peer.makefile("rb") as file:
            peer.settimeout(10)
            peer.shutdown(socket.SHUT_WR)
            assert len(file.read()) == 33
        assert attend([1], 2, seconds=20, port=port) == {1: None}
        assert lead.result() == {0: None}


def test_connections_without_end_delay_nobody():
    port = free_port()
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port)
        first, *_ = (stack.enter_context(connected(port)) for _ in range(100))
        with first.makefile("rb") as file:
            assert len(file.read()) == 33  # only a number and a line end
        assert attend([1], 2, seconds=20, port=port) == {1: None}
        assert lead.result() == {0: None}


def trickle(peer, stopped):
    with contextlib.suppress(OSError):
        while not stopped.wait(0.05):
            peer.sendall(b"a")


def test_a_stranger_that_trickles_bytes_does_not_move_the_deadline():
    port, stopped = free_port(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        start = time.monotonic()
        lead = pool.submit(attend, [0], 2, seconds=1.0, port=port)
        with connected(port) as peer:
            pool.submit(trickle, peer, stopped)
            assert "process 1 of 2 did not connect" in str(lead.result(5)[0])
            assert 0.9 < time.monotonic() - start < 4
            stopped.set()


@pytest.mark.parametrize("words", [b"", b"0" * 32 + b"\n"])
def test_a_stranger_in_place_of_process_0_holds_nobody_past_the_deadline(words):
    stopped = threading.Event()
    with ThreadPoolExecutor(2) as pool, socket.create_server(("", 0)) as server:
        start = time.monotonic()
        port = server.getsockname()[1]
        process = pool.submit(attend, [1], 2, seconds=0.5, port=port)
        with server.accept()[0] as peer:
            peer.sendall(words)
            pool.submit(trickle, peer, stopped)
            assert isinstance(process.result(5)[1], ProcessLost)
            assert time.monotonic() - start < 4
            stopped.set()


def test_the_verdict_of_a_stranger_is_not_believed():
    with ThreadPoolExecutor(1) as pool, socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        process = pool.submit(attend, [1], 2, seconds=5, port=port, token="right")
        with server.accept()[0] as peer:
            peer.sendall(b"0" * 32 + b"\n")
            peer.recv(4096)
            peer.sendall(b"0" * 64 + b' {"missing": "", "differing": ""}\n')
            assert f"has another {TOKEN}" in str(process.result()[1])


def test_a_tunnel_that_hangs_up_before_process_0_is_there_is_tried_again():
    with ThreadPoolExecutor(2) as pool:
        with socket.create_server(("127.0.0.1", 0)) as tunnel:
            port = tunnel.getsockname()[1]
            process = pool.submit(attend, [1], 2, seconds=20, port=port)
            tunnel.accept()[0].close()
        assert attend([0], 2, seconds=20, port=port) == {0: None}
        assert process.result() == {1: None}


def test_a_run_on_this_machine_is_out_of_reach_of_others():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=0.5, port=port)
        connected(port).close()
        # Another address of this machine stands in for another machine.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        lead.result()
