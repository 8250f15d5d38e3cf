"""What the workers of a run decide together, each at the same step. PyTorch only."""

import os

import torch
import torch.distributed as dist

# An exchange goes around a ring, so it takes longer the more workers there are: it then has more than one step.
_WORKERS_PER_STEP = 256
# From here on workers connect only to those that they need, or a node of eight would have eight connections to each of
# all others. For fewer it does not pay, and a worker that dies before the first exchange is noticed later.
_MANY_WORKERS = 512


def least(value: int, device: torch.device) -> int:
    """Return the least value that a worker has; all ask at the same point, and wait for it.

    Args:
        value: This worker's.
        device: Where its tensors travel: its GPU with NCCL.
    """
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


class Agreement:
    """Yes-or-no questions that any worker may answer with yes; all know the answers one step later.

    The answers travel while the next step is computed, on the CPU: no worker waits for them, and no GPU either. Of more
    than 256 workers they travel for some steps, and what is answered meanwhile is not sent: ask until it is known.
    """

    def __init__(self, num_workers: int) -> None:
        """Join; all workers do so at the same point."""
        if num_workers >= _MANY_WORKERS:
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        self._steps, self._asked = -(-num_workers // _WORKERS_PER_STEP), 0
        # torch has a wrong type for what `new_group` returns
        self._group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if num_workers > 1 else None  # type: ignore[assignment]
        self._under_way: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, *answers: bool) -> tuple[bool, ...]:
        """Send this worker's answers; return which questions any worker had answered with yes at the step before.

        A single worker gets its own answers at once.
        """
        if self._group is None:
            return answers
        self._asked += 1
        if (self._asked - 1) % self._steps:
            return (False,) * len(answers)
        known = self._arrived() or (False,) * len(answers)
        sent = torch.tensor(answers, dtype=torch.int32)
        work = dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, sent
        return known

    def finish(self) -> None:
        """Wait for what is under way, before the worker leaves."""
        self._arrived()

    def _arrived(self) -> tuple[bool, ...] | None:
        if self._under_way is None:
            return None
        work, sent = self._under_way
        self._under_way = None
        work.wait()
        return tuple(bool(answer) for answer in sent.tolist())
