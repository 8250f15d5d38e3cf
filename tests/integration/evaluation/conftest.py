"""What the tests of scores share."""

from collections.abc import Iterator

import pytest

from bit_ray.cluster.slots import Resources


@pytest.fixture(autouse=True, scope="module")
def two_tasks_at_a_time() -> Iterator[None]:
    """As on two cores: the shared Ray has more CPUs by name, and a process for each of them only loads PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resources, "slots_for", lambda self, num_parts, *, use_gpu=None: 2)
        yield
