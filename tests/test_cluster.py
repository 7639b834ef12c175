"""Tests the identity of this process, from flags and from cluster environments."""

import http.server
import threading
from typing import ClassVar

import pytest

from jaxii.distributed.cluster import ProcessInfo, detected, first_host, from_flags
from jaxii.errors import InputError


def test_without_flags_there_is_no_place():
    assert from_flags("", 0, -1) is None


def test_three_flags_are_a_place():
    assert from_flags("a:1", 4, 3) == ProcessInfo(coordinator="a:1", count=4, index=3)


@pytest.mark.parametrize(
    "flags", [("a:1", 0, -1), ("", 4, -1), ("", 0, 1), ("a:1", 4, -1), ("a:1", 0, 0)]
)
def test_flags_that_lack_one_another_are_refused(flags):
    with pytest.raises(InputError, match="must be given together"):
        from_flags(*flags)


def test_a_number_that_no_process_has_is_refused():
    with pytest.raises(InputError, match="use 0 to 3"):
        from_flags("a:1", 4, 4)


@pytest.mark.parametrize(
    "address", ["host", "host:", ":80", "host:port", "host:0", "host:65536", "host:٣"]
)
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(InputError, match="HOST:PORT"):
        from_flags(address, 2, 0)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[007-009,12],cpu1", "gpu007"),
        ("gpu[3]-ib,gpu4-ib", "gpu3-ib"),
        ("rack-1-node[12,14]", "rack-1-node12"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def slurm(tasks, index):
    return {
        "SLURM_STEP_NODELIST": "gpu[01-02]",
        "SLURM_JOB_ID": "5",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(index),
    }


def test_a_slurm_step_is_found():
    place = detected(slurm(2, 1))
    assert place == ProcessInfo(coordinator="gpu01:61445", count=2, index=1)


def test_one_task_alone_is_one_process():
    assert detected(slurm(1, 0)) is None


def test_a_tpu_slice_on_kubernetes_is_found():
    env = {"TPU_WORKER_HOSTNAMES": "w0.svc,w1.svc", "TPU_WORKER_ID": "1"}
    assert detected(env) == ProcessInfo(coordinator="w0.svc:8476", count=2, index=1)


def test_the_workers_of_several_slices_are_numbered_slice_by_slice():
    env = {
        "TPU_WORKER_HOSTNAMES": "w0,w1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "lead:8080",
    }
    assert detected(env) == ProcessInfo(coordinator="lead:8476", count=6, index=5)


class Metadata(http.server.BaseHTTPRequestHandler):
    values: ClassVar = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "a:x:10.0.0.4,b:y:10.0.0.5,c:z:10.0.0.6",
    }

    def do_GET(self):
        key = self.path.rpartition("/")[2]
        found = key in self.values and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if found else 404)
        self.end_headers()
        if found:
            self.wfile.write(self.values[key].encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    # Keeps requests away from any proxy of the test machine.
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_cloud_tpu_vm_asks_its_metadata_server(metadata):
    place = detected({"GCE_METADATA_IP": metadata})
    assert place == ProcessInfo(coordinator="10.0.0.4:8476", count=3, index=2)


def test_a_cloud_tpu_vm_that_was_told_not_to_ask_is_alone(metadata):
    assert detected({"GCE_METADATA_IP": metadata, "TPU_SKIP_MDS_QUERY": "1"}) is None


def test_a_laptop_is_alone():
    assert detected({}) is None
