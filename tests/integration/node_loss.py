"""Train on a cluster whose only worker node is killed in mid-run, while another one joins; prints the digest.

Arguments: the config of the run as a file, and a file of the run to wait for before the node is killed.
"""

import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from bit_ray.config import read_config
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

NODE = {"num_cpus": 4, "object_store_memory": 100 * 2**20}


def main(config: Path, awaited: Path) -> None:
    cluster = Cluster(head_node_args={"num_cpus": 0, "include_dashboard": False}, initialize_head=True)
    first = cluster.add_node(**NODE)
    ray.init(address=cluster.address, logging_level="error", log_to_driver=False)

    def replace_node() -> None:
        while not awaited.exists():
            time.sleep(0.02)
        cluster.add_node(**NODE, wait=False)
        first.kill_raylet()
        print("killed a node", flush=True)

    threading.Thread(target=replace_node, daemon=True).start()
    trained = pretrain(read_config(PretrainConfig, config))
    alive = [node["Alive"] for node in ray.nodes() if node["Resources"].get("CPU")]
    print("nodes alive", sorted(alive), flush=True)
    print("weights", trained.result.sha256, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
