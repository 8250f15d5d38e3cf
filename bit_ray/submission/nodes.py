"""A look at every node of a cluster: what it runs and has, and whether it reaches what the job needs."""

import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bit_ray import store
from bit_ray.cluster.slots import num_local_cores
from bit_ray.errors import BitRayError, ConfigError, DataError, root_cause
from bit_ray.submission.machine import Machine
from bit_ray.tracking.address import tracking_uri
from bit_ray.tracking.identity import check_code

_SECONDS = 120.0
_TRY = b"bit-ray preflight\n"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every node must reach."""

    storage: str
    """URI for the run's files; empty: none."""
    written: str
    """URI of a small file that the head has written there; empty: the storage is not tried."""
    tracking: str
    """The job's ``tracking.uri``."""
    paths: tuple[tuple[str, str], ...]
    """Settings that are paths, with their paths."""
    cache: str
    """Where row groups are kept; empty: the default."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What was found on a node."""

    id: str
    address: str
    machine: Machine
    num_cores: int
    num_cpus: float
    """CPUs that Ray counts."""
    num_gpus: float
    """GPUs that Ray counts."""
    shared_memory: int
    """Bytes of /dev/shm; 0: there is none."""
    free_disk: int
    """Free bytes where row groups are kept."""
    free_port: int
    """A port that nobody used."""
    errors: dict[str, BitRayError] = field(default_factory=dict)
    """By what was tried: code, storage, tracker, paths."""


def look_at_nodes(wanted: Wanted) -> tuple[list[Node], list[BitRayError]]:
    """Look at every node; also return what failed on the way."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    refs = [
        ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node["NodeID"]))(_look).remote(
            wanted, node["NodeManagerAddress"], node["NodeID"], dict(node["Resources"])
        )
        for node in alive
    ]
    ray.wait(refs, num_returns=len(refs), timeout=_SECONDS)
    found: list[Node] = []
    failed: list[BitRayError] = []
    for node, ref in zip(alive, refs, strict=True):
        address = node["NodeManagerAddress"]
        try:
            found.append(ray.get(ref, timeout=0))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(ref, force=True)
            failed.append(
                DataError(f"node {address}: no answer within {_SECONDS:.0f} s; look at its logs, or remove it")
            )
        except ray.exceptions.RayError as error:
            last = (str(error).strip().splitlines() or ["no reason"])[-1]
            failed.append(root_cause(error) or DataError(f"node {address}: {last[:300]}; look at its logs"))
    return found, failed


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the strategy that puts a task on a node, and nowhere else."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


@contextmanager
def small_file(folder: str) -> Iterator[str]:
    """Write a small file into a folder, read it, and delete it at the end, with the folders that it needed.

    Raises:
        DataError: One of these does not work.
    """
    uri = store.join(folder, f".preflight-{uuid.uuid4().hex}")
    made = _missing(folder)
    try:
        store.write_bytes(uri, _TRY)
        if store.read_bytes(uri) != _TRY:
            raise DataError(f"{uri}: what was written does not come back; use another store")
        yield uri
        store.delete_files([uri])
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _missing(folder: str) -> list[Path]:
    """Return the local folders that do not exist yet, the innermost first."""
    if not store.is_local(folder):
        return []
    path = Path(store.absolute(folder))
    return [place for place in (path, *path.parents) if not place.exists()]


def _look(wanted: Wanted, address: str, node_id: str, resources: dict[str, float]) -> Node:
    errors: dict[str, BitRayError] = {}

    @contextmanager
    def tried(what: str) -> Iterator[None]:
        try:
            yield
        except BitRayError as error:
            errors[what] = error.about(f"node {address}")

    with tried("code"):
        check_code(f"node {address}")
    with tried("storage"):
        if wanted.written:
            with small_file(wanted.storage):
                if not store.exists(wanted.written):
                    given = f"{wanted.storage} is another folder here than on the head"
                    raise ConfigError.of("storage", given, "s3://..., gs://..., or a folder that all nodes share")
    with tried("tracker"):
        uri = tracking_uri(wanted.tracking, wanted.storage or None)
        if not uri.startswith("sqlite:"):
            from bit_ray.tracking.server import probe  # MLflow takes each node more than a second

            probe(uri)
    with tried("paths"):
        for name, path in wanted.paths:
            if not os.path.exists(path):
                accepted = "s3://..., gs://..., or a path that all nodes share"
                raise ConfigError.of(name, f"{path} does not exist here", accepted, "copy it to such a place")
    with socket.socket() as listening:
        listening.bind(("", 0))
        port = listening.getsockname()[1]
    disk = Path(wanted.cache or tempfile.gettempdir())
    while not disk.exists():
        disk = disk.parent
    return Node(
        id=node_id,
        address=address,
        machine=Machine.here(),
        num_cores=num_local_cores(),
        num_cpus=resources.get("CPU", 0.0),
        num_gpus=resources.get("GPU", 0.0),
        shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        free_disk=shutil.disk_usage(disk).free,
        free_port=port,
        errors=errors,
    )
