"""The file that says where each worker of a group that stands still is."""

import logging
import threading

from bit_ray import store
from bit_ray.errors import StoreError
from bit_ray.training.messages import Sign

log = logging.getLogger(__name__)


class StackFile:
    """Written behind the driver, who must go on watching when the store does not answer either."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._written = 0
        self._writing: threading.Thread | None = None

    def offer(self, signs: dict[int, tuple[Sign, float]], stacks: dict[int, str]) -> None:
        """Write the stacks by rank if there are more than before, each under the worker's sign of life."""
        if len(stacks) <= self._written or (self._writing is not None and self._writing.is_alive()):
            return
        self._written = len(stacks)
        parts = [
            f"worker {rank} on {signs[rank][0].host}, step {signs[rank][0].step}, {signs[rank][0].phase}:\n{stack}"
            for rank, stack in sorted(stacks.items())
            if rank in signs
        ]
        self._writing = threading.Thread(target=self._write, args=("\n".join(parts),), name="stacks", daemon=True)
        self._writing.start()

    def _write(self, text: str) -> None:
        try:
            store.write_bytes(self.uri, text.encode())
        except StoreError as error:
            log.warning("%s; the training continues", error)
