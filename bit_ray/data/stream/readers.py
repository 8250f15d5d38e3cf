"""Reader tasks: Ray Data carries out read requests on the node of the worker that makes them."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from bit_ray.cluster.session import quiet_ray_data
from bit_ray.data.stream.requests import ReadRequest, read


def read_on_node(requests: Sequence[ReadRequest], num_readers: int) -> list[pa.Table]:
    """Return one table per request, in order, from reader tasks on this node."""
    quiet_ray_data()
    dataset = ray.data.read_datasource(
        _Requests(requests),
        override_num_blocks=len(requests),
        concurrency=num_readers,
        # They wait for disks and networks, and must be scheduled even if trainers hold every CPU.
        num_cpus=0,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


class _Requests(Datasource):
    """Ray Data source with one read task, and one block, per request."""

    def __init__(self, requests: Sequence[ReadRequest]):
        super().__init__()
        self._requests = requests

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)

        def task(request: ReadRequest) -> ReadTask:
            return ReadTask(lambda: [read(request)], metadata)

        return [task(request) for request in self._requests]
