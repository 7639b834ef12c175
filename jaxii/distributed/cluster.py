"""Cluster detection by flags, environment variables or a Cloud TPU's metadata."""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxii.errors import InputError

# Port of process 0 if the cluster names none; JAX uses the same one on TPUs.
PORT = 8476
METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"
METADATA_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Address and index of one process of a run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: Number of processes, at least 1.
      index: Index of this process, from 0.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise InputError(
                f"--process_id={self.index} is out of range for --num_processes="
                f"{self.count}; use 0 to {self.count - 1}."
            )
        port = re.fullmatch(r".+:(\d{1,5})", self.coordinator, re.ASCII)
        if not port or not 0 < int(port[1]) < 2**16:
            raise InputError(
                f"--coordinator={self.coordinator} is not HOST:PORT; use an address of "
                "process 0 that all others can reach, with a port from 1 to 65535."
            )


def from_flags(coordinator: str, count: int, index: int) -> ProcessInfo | None:
    """Returns the process that the flags describe; None if no flag is given.

    Args:
      coordinator: HOST:PORT; "" if not given.
      count: 0 if not given.
      index: -1 if not given.

    Raises:
      InputError: If only some are given, or they contradict each other.
    """
    given = (bool(coordinator), count > 0, index >= 0)
    if not any(given):
        return None
    if not all(given):
        raise InputError(
            "--coordinator, --num_processes and --process_id must be given together; "
            "pass all three to every process, or none if the cluster is detected."
        )
    return ProcessInfo(coordinator=coordinator, count=count, index=index)


def detected(env: Mapping[str, str] = os.environ) -> ProcessInfo | None:
    """Returns this process's place in its cluster; None if it has none or is alone."""
    for detect in _CLUSTERS:
        process = detect(env)
        if process is not None and process.count > 1:
            return process
    return None


def _slurm(env: Mapping[str, str]) -> ProcessInfo | None:
    """Detects a step of Slurm: `srun` with one task per node."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    # Two jobs may share a node, so the port depends on the job; one job runs one step
    # at a time.
    port = 61440 + int(env.get("SLURM_JOB_ID", "0")) % 4096
    return ProcessInfo(
        coordinator=f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        count=int(env["SLURM_NTASKS"]),
        index=int(env["SLURM_PROCID"]),
    )


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list, such as `gpu[007-009,12],cpu1`."""
    name = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodelist)
    if name is None:
        raise InputError(f"SLURM_STEP_NODELIST={nodelist} names no node.")
    stem, numbers, rest = name.groups(default="")
    return stem + re.split("[,-]", numbers)[0] + rest


def _gke_tpu(env: Mapping[str, str]) -> ProcessInfo | None:
    """Detects one or several TPU slices on Kubernetes."""
    if not env.get("TPU_WORKER_HOSTNAMES"):
        return None
    hosts = env["TPU_WORKER_HOSTNAMES"].split(",")
    return _tpu(env, hosts, int(env.get("TPU_WORKER_ID", "0")))


def _cloud_tpu(env: Mapping[str, str]) -> ProcessInfo | None:
    """Detects a Cloud TPU VM by its metadata server."""
    devices = (*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*"))
    if not (devices or env.get("GCE_METADATA_IP")) or env.get("TPU_SKIP_MDS_QUERY"):
        return None
    index = _metadata(env, "agent-worker-number")
    workers = _metadata(env, "worker-network-endpoints")
    if index is None or workers is None:
        return None
    # Each entry is a name, or name:id:address.
    hosts = [worker.split(":")[-1] for worker in workers.split(",")]
    return _tpu(env, hosts, int(index))


def _tpu(env: Mapping[str, str], hosts: list[str], worker: int) -> ProcessInfo:
    slices = int(env.get("MEGASCALE_NUM_SLICES") or 1)
    slice_index = int(env.get("MEGASCALE_SLICE_ID") or 0)
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    return ProcessInfo(
        coordinator=f"{first.partition(':')[0]}:{PORT}",
        count=slices * len(hosts),
        index=slice_index * len(hosts) + worker,
    )


def _metadata(env: Mapping[str, str], key: str) -> str | None:
    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        METADATA.format(host, key), headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None


_CLUSTERS: tuple[Callable[[Mapping[str, str]], ProcessInfo | None], ...] = (
    _slurm,
    _gke_tpu,
    _cloud_tpu,
)
