"""Images that a run leaves out because they cannot be read: known to every worker, counted, and limited."""

import json
from collections.abc import Iterable
from dataclasses import asdict

import torch
import torch.distributed as dist

from bit_ray.config import from_dict
from bit_ray.data.stream.requests import BadExample
from bit_ray.errors import DataError

_NAMED = 3


class Quarantine:
    """The bad images a run has met.

    Each is counted once, even if more epochs meet it. Its slot stays empty: no other image's step changes, and the sum
    of the losses is divided by the same global batch size.

    Args:
        known: Those met before the run was resumed.
        allowed: Most bad images that the run may have.
        shards: URI of the set, for the message.
    """

    def __init__(self, known: Iterable[BadExample], allowed: int, shards: str):
        self.allowed, self.shards = allowed, shards
        self._known = {(bad.shard, bad.row): bad for bad in known}
        self._unshared: list[BadExample] = []
        self._unreported = list(self._known.values())

    @property
    def known(self) -> tuple[BadExample, ...]:
        """All that every worker knows."""
        return tuple(self._known.values())

    def meet(self, bad: Iterable[BadExample]) -> None:
        """Note what this worker has met."""
        self._unshared += [b for b in bad if (b.shard, b.row) not in self._known]

    def share(self, device: torch.device) -> None:
        """Exchange what the workers have met; all of them call this at the same step.

        Raises:
            DataError: More are bad than allowed; every worker raises it.
        """
        found = [self._unshared]
        if dist.is_initialized() and dist.get_world_size() > 1:
            count = torch.tensor(len(self._unshared), device=device)
            dist.all_reduce(count)
            if count:
                found = _gathered(self._unshared, device)
        for bad in (bad for part in found for bad in part):
            if (bad.shard, bad.row) not in self._known:
                self._known[bad.shard, bad.row] = bad
                self._unreported.append(bad)
        self._unshared = []
        if len(self._known) > self.allowed:
            named = "; ".join(
                f"{b.shard} row {b.row} ({b.id or 'id unknown'}): {b.reason}" for b in self.known[:_NAMED]
            )
            raise DataError(
                f"{self.shards}: {len(self._known):,} images cannot be read; accepted: at most {self.allowed:,} "
                f"(runtime.max_bad_images); first: {named}; run bit-ray shards verify {self.shards} and restore what "
                "it names, or raise the limit; then start the run again to continue from its last checkpoint"
            )

    def take_unreported(self) -> list[BadExample]:
        """Those that have not been reported yet."""
        news, self._unreported = self._unreported, []
        return news


def _gathered(mine: list[BadExample], device: torch.device) -> list[list[BadExample]]:
    """Return what each worker has, as JSON: PyTorch's own exchange of objects would unpickle them."""
    data = json.dumps([asdict(bad) for bad in mine]).encode()
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    texts = [part[: int(length)].cpu().numpy().tobytes() for part, length in zip(parts, lengths, strict=True)]
    return [[from_dict(BadExample, bad) for bad in json.loads(text)] for text in texts]
