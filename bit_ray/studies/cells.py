"""One training of a study, and its score: where it is trained and measured does not matter here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from bit_ray import store
from bit_ray.config import digest
from bit_ray.training.plan import TrainPlan


@dataclass(frozen=True)
class Part:
    """Some examples of a shard set."""

    shards: str
    """URI of the set."""
    digest: str
    """Digest of its manifest."""
    rows: tuple[int, ...] | None = None
    """Ascending indices of the examples in the set; None: all."""

    @property
    def indices(self) -> npt.NDArray[np.int64] | None:
        """The rows as an array."""
        return None if self.rows is None else np.asarray(self.rows, np.int64)


@dataclass(frozen=True)
class Probe:
    """Few-shot accuracy of the frozen features: ridge regression on a few examples of another set."""

    support: Part
    """What the examples are: a set, and the rows of one draw."""
    shots: int
    """Examples per class in it."""
    test: Part
    """What they are tested on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of a study, and what is measured of it."""

    plan: TrainPlan
    """What to learn."""
    train: Part
    """From which examples."""
    at_steps: tuple[int, ...] = ()
    """Numbers of steps after which it is measured; it always is at the end."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Sets whose loss and top-1 are measured, by name, such as ``val``."""
    test: Part | None = None
    """Scored once, at the end. Only a configuration that was chosen without it may have one."""
    probe: Probe | None = None
    """Measured too, if given."""
    norms: bool = False
    """Whether norms and turns of the kernels are measured too."""
    rungs: str = ""
    """URI of the folder in which it is compared with others at each of ``at_steps``, and ends itself where it is not
    among the best; empty: it runs to its end."""

    @property
    def identity(self) -> str:
        """Digest of all that decides its score."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return digest(
            {
                "plan": self.plan.digest,
                "train": asdict(self.train) | {"shards": ""},
                "at_steps": list(self.at_steps),
                "parts": {name: part | {"shards": ""} for name, part in parts.items()},
                "test": None if self.test is None else asdict(self.test) | {"shards": ""},
                "probe": None if self.probe is None else [self.probe.shots, self.probe.support.digest],
                "norms": self.norms,
                **({"rungs": True} if self.rungs else {}),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured after some steps."""

    step: int
    values: dict[str, float]
    """By name: ``val/loss``, ``val/top_1``, ``train/loss``, ``probe/top_1``, ``norm/stage1``, ``turn``."""


@dataclass(frozen=True, kw_only=True)
class CellScore:
    """What came out of a cell."""

    identity: str
    """Of the cell."""
    final: dict[str, float]
    """Values at the end, also of the test set; without losses if it diverged."""
    points: tuple[Point, ...]
    """Values along the way and at the end."""
    losses: tuple[tuple[int, float], ...]
    """Training loss: the last step of each block of steps, and the mean over them."""
    images: int
    """Training images seen."""
    device_s: float
    """Seconds of its device, GPU or CPU core, for training and measuring."""
    decay_exposure: float
    """Sum over steps of learning rate x weight decay / (1 - momentum): by how much decay alone shrinks log weights."""
    rate_changed_at: int
    """Last step at which the learning rate changed by a drop; a cosine has none."""
    diverged: bool = False
    """Whether the loss became not finite; accuracies are 0 then."""
    stopped_at: int = 0
    """Steps after which it ended itself as not among the best; 0: it ran to its end."""


def load_cell(uri: str, identity: str) -> CellScore | None:
    """Read the score of a cell; None if it has none, or was another cell.

    Raises:
        DataError: the file is not a score.
    """
    if not store.exists(uri):
        return None
    score = store.read_record(CellScore, uri, "delete it to run the training again")
    return score if score.identity == identity else None
