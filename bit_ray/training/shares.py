"""How a global batch is divided: slots for each worker, micro-batches of a share. Shares may be uneven.

The loss is divided by the global batch and gradients are summed, so how a batch is split changes only rounding.
"""

from bit_ray.errors import ConfigError
from bit_ray.training.config import Runtime
from bit_ray.training.plan import TrainPlan


def share_out(plan: TrainPlan, runtime: Runtime, num_workers: int) -> tuple[list[range], int]:
    """Return the slots of each worker, and the examples per forward and backward pass.

    Raises:
        ConfigError: There are more workers than shares, or the split would separate MixUp's pairs or the images over
            which BatchNorm takes its statistics; or the plan cannot be trained in shards.
    """
    if runtime.sharding != "none":
        for field, given, accepted in (
            ("model", plan.model if plan.batch_of_statistics else "", "a network with GroupNorm"),
            ("train", plan.train if plan.train != "all" else "", "all"),
        ):
            if given:
                given = f"{given}, but runtime.sharding is {runtime.sharding}"
                raise ConfigError.of(field, given, accepted, "change one of them")
    shares = plan_slots(plan, num_workers)
    return shares, plan_micro_batch(plan, max(map(len, shares)), runtime.micro_batch_size)


def plan_slots(plan: TrainPlan, num_workers: int) -> list[range]:
    """Return the batch slots of each worker; see `worker_slots`."""
    pairs = plan.mixup_alpha > 0
    return worker_slots(plan.global_batch_size, num_workers, pairs=pairs, group=_group_size(plan))


def _group_size(plan: TrainPlan) -> int:
    """Return the consecutive slots that one forward pass of one worker must see; 0: any number."""
    return plan.batch_of_statistics if plan.batch_statistics == "group" else 0


def plan_micro_batch(plan: TrainPlan, largest_share: int, micro_batch_size: int) -> int:
    """Return the examples per forward and backward pass; see `micro_batch`.

    With BatchNorm the number is fixed: statistics are taken over the images of one pass, of one or of all workers.

    Raises:
        ConfigError: The size would split MixUp's pairs or change what BatchNorm learns.
    """
    if not (statistics := plan.batch_of_statistics):
        return micro_batch(largest_share, micro_batch_size, pairs=plan.mixup_alpha > 0)
    group = _group_size(plan)
    if micro_batch_size not in (0, group):
        given = f"{micro_batch_size}, but {plan.model} computes its statistics over {statistics} images"
        accepted, remedy = (f"0 or {group}", "set norm_batch instead") if group else ("0", "add workers, or use -bn")
        raise ConfigError.of("micro_batch_size", given, accepted, remedy)
    return group or largest_share


def worker_slots(global_batch_size: int, num_workers: int, *, pairs: bool = False, group: int = 0) -> list[range]:
    """Return the batch slots of each worker, in order: consecutive, and as equal as possible.

    Args:
        global_batch_size: Examples per optimizer step.
        num_workers: Training workers.
        pairs: Whether slots 2i and 2i + 1 must stay together, as MixUp's pairs must.
        group: Consecutive slots that must stay together, as those of BatchNorm's statistics must; 0: any.

    Raises:
        ConfigError: There are more workers than shares.
    """
    unit = group or (2 if pairs else 1)
    num_units = global_batch_size // unit
    if num_workers > num_units:
        what = "pairs of images that MixUp mixes" if pairs else "images"
        if group:
            what = f"groups of {group} images over which BatchNorm computes its statistics"
        accepted = f"at most {num_units}, the {what} in a global batch"
        raise ConfigError.of("runtime.num_workers", num_workers, accepted, "lower it, or raise the batch size")
    cuts = [worker * num_units // num_workers * unit for worker in range(num_workers + 1)]
    return [range(start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)]


def micro_batch(largest_share: int, micro_batch_size: int, *, pairs: bool = False) -> int:
    """Return the examples per forward and backward pass; the last pass of a step may have fewer.

    Args:
        largest_share: Slots of the worker that has most.
        micro_batch_size: The setting; 0: the whole share.
        pairs: Whether MixUp's pairs must stay in one pass.

    Raises:
        ConfigError: The size is odd although MixUp mixes pairs.
    """
    if pairs and micro_batch_size % 2:
        accepted = "an even number, because MixUp mixes pairs of neighbours"
        raise ConfigError.of("micro_batch_size", micro_batch_size, accepted, "add one")
    return min(micro_batch_size or largest_share, largest_share)
