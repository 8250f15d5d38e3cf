"""A learner: the network, optimizer and step of a plan on one device. PyTorch only.

All training uses it: a Ray Train worker, training in memory, a replay, an estimate of the time.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bit_ray.data.stream.rows import Row
from bit_ray.models.network import Network
from bit_ray.models.zoo import create_model
from bit_ray.training.agreement import least
from bit_ray.training.config import Precision
from bit_ray.training.device import resolve_precision, to_channels_last
from bit_ray.training.healing import Healer
from bit_ray.training.memory import free_gpu_memory, gpu_micro_batch
from bit_ray.training.optimizer import build_optimizer, initial_weights
from bit_ray.training.parts import set_trainable
from bit_ray.training.plan import TrainPlan
from bit_ray.training.sharding import shard
from bit_ray.training.shares import plan_micro_batch, plan_slots
from bit_ray.training.step import TrainStep, micro_batches


class Learner:
    """Trains by a plan, one step after the other.

    Args:
        plan: What to learn.
        device: Where.
        precision: See `bit_ray.training.device.resolve_precision`.
        init_weights: Initial tensors by name; the head's are left out. None: from scratch.
        micro_batch_size: Examples per forward and backward pass; 0: the worker's whole share, or on a GPU as many as it
            has room for.
        rank: Number of this worker.
        num_workers: Workers that share the global batch.
        healer: Leaves out steps that are out of the ordinary. None: one that is not finite is an error.
        sharded: Keep only a shard of weights, gradients and momentum here; all workers are made together then.

    Raises:
        ConfigError: The precision or the sizes are not possible.
    """

    def __init__(
        self,
        plan: TrainPlan,
        device: torch.device,
        *,
        precision: Precision = "auto",
        init_weights: Mapping[str, torch.Tensor] | None = None,
        micro_batch_size: int = 0,
        rank: int = 0,
        num_workers: int = 1,
        healer: Healer | None = None,
        sharded: bool = False,
    ) -> None:
        self.plan, self.device = plan, device
        slots = plan_slots(plan, num_workers)
        self.slots = slots[rank]
        """Slots of every batch that are this worker's."""
        self.sharded = sharded
        """Whether this worker has only shards."""
        self._largest_share = max(map(len, slots))
        self._num_shards = num_workers if sharded else 1
        self._split(micro_batch_size)
        self.model = build_model(plan, init_weights)
        """The network itself; in training mode."""
        self.dtype = resolve_precision(
            precision, device, num_features=self.model.num_features, crop_size=plan.view.crop_size
        )
        """Data type of the convolutions."""
        if sharded:
            shard(self.model, device)
        else:
            to_channels_last(self.model.to(device))
        self.model.train()
        self._by_room = device.type == "cuda" and not micro_batch_size and not plan.batch_of_statistics
        if self._by_room:
            self._split(gpu_micro_batch(plan, free_gpu_memory(device), self._num_shards))
        self.optimizer = build_optimizer(self.model, plan)
        self._step = TrainStep(
            self.model,
            self.optimizer,
            plan,
            dtype=self.dtype,
            num_workers=num_workers,
            first_slot=self.slots.start,
            healer=healer,
        )

    def wrap(self, *, distributed: bool, compile: bool = False) -> None:
        """Share gradients with the other workers, whose weights become those of rank 0; compile the network.

        Where GPUs have different room, the smallest counts for all. A network in shards shares gradients by itself, and
        is not compiled.
        """
        if distributed and self._by_room:
            self._split(least(self.micro_batch_size, self.device))
        if self.sharded:
            return
        wrapped: nn.Module = self.model
        if distributed:
            # Running statistics are the same on all workers, by `bit_ray.models.batch_norm.update_running`.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name that PyTorch 2.11 does not know
                wrapped = DistributedDataParallel(wrapped, gradient_as_bucket_view=True, broadcast_buffers=False)
            for tensor in (*self.model.buffers(), *initial_weights(self.model, self.optimizer).values()):
                dist.broadcast(tensor, src=0)
        if compile:
            wrapped = torch.compile(wrapped)  # type: ignore[assignment]
        self._step.model = wrapped

    def _split(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        """Examples per forward and backward pass, as set or as there is room; 0: the whole share."""
        self._micro = plan_micro_batch(self.plan, self._largest_share, micro_batch_size)
        # Workers with shards wait for each other in every pass, so all of them take as many.
        self._least = -(-self._largest_share // self._micro) if self.sharded else 0

    def targets(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the objective's targets for the rows of a batch; see `step`."""
        return self._step.objective.targets(rows)

    def step(self, step: int, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take one optimizer step.

        Args:
            step: 0-based.
            images: ``[b, H, W, 3] uint8``, this worker's slots of the batch.
            targets: ``[b] int64``, or ``[b, C]``.

        Returns:
            This worker's share of the loss, and the norm of the global gradient; see `TrainStep`.

        Raises:
            DivergedError: The step before this one had no finite gradient, or may not be left out.
            GoBackError: It has shown that the weights are broken.
        """
        num = max(-(-len(images) // self._micro), self._least)
        return self._step(step, micro_batches(images, targets, self._micro, self._least), num)

    def check(self) -> None:
        """Wait for the last step and make sure that it was applied; see `TrainStep.check`.

        Raises:
            DivergedError: It was not.
            GoBackError: It has shown that the weights are broken.
        """
        self._step.check()


def build_model(plan: TrainPlan, init_weights: Mapping[str, torch.Tensor] | None) -> Network:
    """The network at step 0, seeded, or the given trunk with a zero head; frozen where the plan does not train it.

    Args:
        plan: Names the architecture, the seed and the head's initial bias.
        init_weights: Tensors by name; the head's are left out.
    """
    torch.manual_seed(plan.seed)
    model = create_model(plan.model, plan.num_classes)
    if init_weights is not None:
        trunk = {name: tensor for name, tensor in init_weights.items() if not name.startswith("head.")}
        missing, unexpected = model.load_state_dict(trunk, strict=False)
        assert sorted(missing) == ["head.bias", "head.weight"], missing
        assert not unexpected, unexpected
    if plan.head_bias:
        nn.init.constant_(model.head.bias, plan.head_bias)
    set_trainable(model, plan.train)
    return model
