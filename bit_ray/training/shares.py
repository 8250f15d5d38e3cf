"""How a global batch is shared out: slots for each worker, micro-batches of a share. Shares may be uneven.

The loss is divided by the global batch and gradients are summed, so how a batch is cut changes only rounding.
"""

from bit_ray.errors import ConfigError
from bit_ray.training.config import Runtime
from bit_ray.training.plan import TrainPlan


def share_out(plan: TrainPlan, runtime: Runtime, num_workers: int) -> tuple[list[range], int]:
    """Return the slots of each worker, and the examples per forward and backward pass.

    Raises:
        ConfigError: There are more workers than shares, or MixUp's pairs would be cut.
    """
    pairs = plan.mixup_alpha > 0
    shares = worker_slots(plan.global_batch_size, num_workers, pairs=pairs)
    return shares, micro_batch(max(map(len, shares)), runtime.micro_batch_size, pairs=pairs)


def worker_slots(global_batch_size: int, num_workers: int, *, pairs: bool = False) -> list[range]:
    """Return the batch slots of each worker, in order: consecutive, and as equal as can be.

    Args:
        global_batch_size: Examples per optimizer step.
        num_workers: Training workers.
        pairs: Whether slots 2i and 2i + 1 must stay together, as MixUp's pairs must.

    Raises:
        ConfigError: There are more workers than shares.
    """
    unit = 2 if pairs else 1
    num_units = global_batch_size // unit
    if num_workers > num_units:
        what = "pairs of images that MixUp mixes" if pairs else "images"
        raise ConfigError(
            f"runtime.num_workers: {num_workers}; at most {num_units}, the {what} in a global batch; lower it, or "
            "raise the batch"
        )
    cuts = [worker * num_units // num_workers * unit for worker in range(num_workers + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def micro_batch(largest_share: int, micro_batch_size: int, *, pairs: bool = False) -> int:
    """Return the examples per forward and backward pass; the last pass of a step may have fewer.

    Args:
        largest_share: Slots of the worker that has most.
        micro_batch_size: What was asked for; 0: the whole share.
        pairs: Whether MixUp's pairs must stay in one pass.

    Raises:
        ConfigError: The size is odd although MixUp mixes pairs.
    """
    if pairs and micro_batch_size % 2:
        raise ConfigError(
            f"micro_batch_size: {micro_batch_size}; an even number, because MixUp mixes pairs of neighbours; add one"
        )
    return min(micro_batch_size or largest_share, largest_share)
