"""The cloud of `clusters/local.sh up --autoscaling`: a node provider of Ray's autoscaler whose machines are processes.

Each machine is a `ray start --block` on this one, with a loopback address and ports of its own, as the script starts
them. What the script and the provider know of each other lies in CLUSTER_DIR: `nodeN-TYPE.pid` for each node; an empty
file `refused` or `refused-TYPE` while no machine (of the type) is to be had; `autoscaler` as soon as it works.
"""

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from bit_ray.cluster.launcher import tell_refused

HEAD = "node0"
MOST_NODES = 99
_SECONDS_TO_END = 5.0  # after its notice

Tags = dict[str, str]


class LocalNodes(NodeProvider):
    """Starts and ends the nodes that the autoscaler asks for.

    The autoscaler calls it from several threads.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder, self._port = Path(os.environ["CLUSTER_DIR"]), int(os.environ["CLUSTER_PORT"])
        self._notice_s = float(os.environ["CLUSTER_NOTICE_S"])
        self._lock = threading.Lock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        head = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: "head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        self._tags: dict[str, Tags] = {HEAD: head}
        self._last = 0

    def non_terminated_nodes(self, tag_filters: Tags) -> list[str]:
        (self._folder / "autoscaler").touch()
        with self._lock:
            return [node for node, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        with self._lock:
            return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> Tags:
        with self._lock:
            return dict(self._tags.get(node_id, {}))

    def set_node_tags(self, node_id: str, tags: Tags) -> None:
        with self._lock:
            self._tags[node_id].update(tags)

    def internal_ip(self, node_id: str) -> str:
        return _address(_number(node_id))

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node(self, node_config: dict[str, Any], tags: Tags, count: int) -> None:
        raise NotImplementedError("the autoscaler gives resources and labels")

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: Tags, count: int, resources: dict[str, float], labels: Tags
    ) -> None:
        """Start nodes of one type.

        Raises:
            NodeLaunchException: There are none of this type to be had; the autoscaler then tries another.
        """
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        for _ in range(count):
            with self._lock:
                if (self._folder / "refused").exists() or (self._folder / f"refused-{kind}").exists():
                    tell_refused(kind)
                    raise NodeLaunchException("InsufficientCapacity", f"no machine of type {kind} is to be had", None)
                number = self._free_number()
                node = f"node{number}-{kind}"
                process = self._start(number, node, kind, resources, labels)
                self._last = number
                self._processes[node] = process
                self._tags[node] = {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
                pid_file = self._folder / f"{node}.pid"
                pid_file.write_text(f"{process.pid}\n")
            threading.Thread(target=self._bury, args=(node, process, pid_file), daemon=True).start()

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            process = self._processes.get(node_id)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            threading.Thread(target=self._end, args=(process,), daemon=True).start()

    def _free_number(self) -> int:
        """Numbers go round, so that the next node does not need the ports of one that has just ended."""
        taken = {_number(node) for node in self._tags}
        for step in range(MOST_NODES):
            number = (self._last + step) % MOST_NODES + 1
            if number not in taken:
                return number
        raise NodeLaunchException("InsufficientCapacity", f"{MOST_NODES} nodes are up", None)

    def _start(
        self, number: int, node: str, kind: str, resources: dict[str, float], labels: Tags
    ) -> "subprocess.Popen[bytes]":
        amounts = dict(resources)
        ports = self._port + 20 * number
        named = [
            "node-manager",
            "object-manager",
            "runtime-env-agent",
            "dashboard-agent-grpc",
            "dashboard-agent-listen",
            "metrics-export",
        ]
        command = [
            os.environ["CLUSTER_RAY"],
            *("start", "--block", "--disable-usage-stats"),
            f"--address={_address(0)}:{self._port}",
            f"--node-ip-address={_address(number)}",
            f"--num-cpus={int(amounts.pop('CPU', 0))}",
            f"--num-gpus={int(amounts.pop('GPU', 0))}",
            f"--object-store-memory={int(amounts.pop('object_store_memory', os.environ['CLUSTER_STORE_BYTES']))}",
            f"--temp-dir={self._folder}/{node}",
            *(f"--{name}-port={ports + offset}" for offset, name in enumerate(named, start=2)),
            *("--min-worker-port=0", "--max-worker-port=0"),
        ]
        amounts.pop("memory", None)  # of a real machine, in a file that was copied from one
        if amounts:
            command.append(f"--resources={json.dumps(amounts)}")
        if labels:
            command.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
        environment = {
            **os.environ,
            "RAY_CLOUD_INSTANCE_ID": node,
            "RAY_NODE_TYPE_NAME": kind,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": f"{self._notice_s:g}",
        }
        with open(self._folder / f"{node}.log", "wb") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _bury(self, node: str, process: "subprocess.Popen[bytes]", pid_file: Path) -> None:
        """Forget a node whose process has ended, whoever has ended it."""
        process.wait()
        with self._lock:
            del self._tags[node], self._processes[node]
            pid_file.unlink(missing_ok=True)

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            process.wait(self._notice_s + _SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that it leads

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config


def _number(node: str) -> int:
    return int(node.removeprefix("node").partition("-")[0])


def _address(number: int) -> str:
    """As in local.sh."""
    return f"127.0.0.{number + 2}"
