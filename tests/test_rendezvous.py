"""The rendezvous over loopback: every process names the missing ones."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jaxii.distributed.rendezvous import ProcessLost, wait_for_processes
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


def attend(indices, count, *, programs=None, seconds=1.0, port=None):
    """Holds a rendezvous of some processes; returns the error of each."""
    address = f"127.0.0.1:{port or free_port()}"

    def one(index):
        program = (programs or {}).get(index, "same")
        try:
            wait_for_processes(address, index, count, program, seconds)
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
        assert "processes 2, 4 of 5 did not come within 1 s" in str(error)


def test_without_process_0_the_others_say_so():
    told = attend([1, 2], 3, seconds=0.5)
    for error in told.values():
        assert "process 0, the coordinator at 127.0.0.1" in str(error)
        assert "did not answer" in str(error)


def test_a_process_with_another_program_is_named():
    told = attend([0, 1, 2], 3, programs={2: "other"}, seconds=20)
    for error in told.values():
        assert isinstance(error, InputError)
        assert str(error).startswith("process 2 of 3 runs another version")


def test_one_that_ends_while_others_wait_is_named_at_once():
    port = free_port()
    start = time.monotonic()

    def come_and_go():
        with connected(port) as peer:
            peer.sendall(b'{"process": 1, "program": "same"}\n')
            time.sleep(0.3)

    visitor = threading.Thread(target=come_and_go)
    visitor.start()
    told = attend([0], 3, seconds=30, port=port)
    visitor.join()
    assert "process 1 of 3 ended during start-up" in str(told[0])
    assert time.monotonic() - start < 20


def test_a_number_given_twice_is_refused():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        lead = pool.submit(attend, [0], 3, seconds=3, port=port)
        twins = pool.submit(attend, [1], 3, seconds=3, port=port)
        time.sleep(1.0)
        again = attend([1], 3, seconds=3, port=port)[1]
        assert isinstance(again, InputError)
        assert "its own number" in str(again)
        assert "process 2 of 3 did not come" in str(lead.result()[0])
        assert "process 2 of 3 did not come" in str(twins.result()[1])


def test_a_port_that_is_taken_is_an_error_that_says_so():
    with socket.create_server(("", 0)) as taken:
        told = attend([0], 2, port=taken.getsockname()[1])
    assert isinstance(told[0], InputError)
    assert "--coordinator" in str(told[0])


def test_whoever_says_nonsense_is_not_counted():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        lead = pool.submit(attend, [0], 2, seconds=20, port=port)
        with connected(port) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert attend([1], 2, seconds=20, port=port) == {1: None}
        assert lead.result() == {0: None}
