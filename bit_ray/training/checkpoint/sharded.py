"""How the workers of a training in shards write a checkpoint together, each some of the tensors.

Every tensor is gathered once, and one worker keeps it and writes it whole. So each file is an ordinary safetensors
file, the work is shared, and a reader need not know how many workers there were or how they cut a tensor.
"""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import StoreError
from bit_ray.training.checkpoint.directory import write_directory
from bit_ray.training.checkpoint.state import OPTIMIZER_FILE, Position, write_checkpoint_record
from bit_ray.training.plan import TrainPlan
from bit_ray.weights.package import ModelSpec, describe
from bit_ray.weights.tensor_files import WEIGHTS_FILE, TensorFile, Weights, write_tensors

_ANSWER_BYTES = 8192
_LONGEST_REASON = 1000
# A worker waits here for the slowest store; one that dies closes its connections, which ends the others.
_PATIENCE = timedelta(days=1)


class Parts:
    """One worker's part of every checkpoint; all workers make theirs at the same point."""

    def __init__(self, rank: int, num_workers: int) -> None:
        """Join."""
        self.rank, self.num_workers = rank, num_workers
        # Of its own, because the workers meet in their threads, while they train.
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def any(self, answer: bool, device: torch.device) -> bool:
        """Return whether any worker answers with yes; all workers ask at the same point of their training."""
        seen = torch.tensor(int(answer), dtype=torch.int32, device=device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return bool(seen.item())

    def mine(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Return which tensors this worker writes: each the largest that is left, for the worker that has least."""
        loads, mine = [0] * self.num_workers, set()
        for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
            worker = loads.index(min(loads))
            loads[worker] += tensors[name].numel()
            if worker == self.rank:
                mine.add(name)
        return mine

    def write(
        self,
        uri: str,
        state: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        spec: ModelSpec,
        plan: TrainPlan,
        position: Position,
        metrics: Mapping[str, float],
    ) -> None:
        """Write this worker's tensors; when all workers have, the first one completes the checkpoint.

        Raises:
            BitRayError: A worker could not write its own.
        """
        files: dict[str, TensorFile] = {}

        def write_mine(directory: Path) -> None:
            for kind, tensors in ((OPTIMIZER_FILE, state), (WEIGHTS_FILE, model)):
                if tensors:
                    number = f"{self.rank + 1:05d}-of-{self.num_workers:05d}"
                    path = directory / kind.replace(".", f"-{number}.")
                    write_tensors(path, tensors)
                    files[kind] = TensorFile.of(path)

        answer: dict[str, Any]
        failure: BaseException | None = None
        try:
            write_directory(uri, write_mine, part=f"part-{self.rank + 1}")
            answer = {"files": {kind: to_dict(file) for kind, file in files.items()}}
        except BaseException as error:  # the others must know, or they would wait
            failure, answer = error, {"reason": (str(error) or repr(error))[:_LONGEST_REASON]}
        told = self._tell(answer)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(told):
            if "reason" in answer:
                raise StoreError(f"worker {rank}: {answer['reason']}")
        if self.rank:
            return
        parts = {
            kind: tuple(from_dict(TensorFile, answer["files"][kind]) for answer in told if kind in answer["files"])
            for kind in (OPTIMIZER_FILE, WEIGHTS_FILE)
        }

        def complete(directory: Path) -> None:
            describe(directory, spec, Weights.in_parts(parts[WEIGHTS_FILE]))
            write_checkpoint_record(directory, plan, position, metrics, parts[OPTIMIZER_FILE])

        write_directory(uri, complete, part="mark")

    def _tell(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what each worker says, as JSON in tensors."""
        data = json.dumps(answer).encode()
        mine = torch.zeros(_ANSWER_BYTES, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        told = [torch.empty_like(mine) for _ in range(self.num_workers)]
        dist.all_gather(told, mine, group=self._group)
        return [json.loads(bytes(answer.tolist()).rstrip(b"\0")) for answer in told]
