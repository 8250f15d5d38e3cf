"""What the tests of studies share."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_study import TINY

from bit_ray.cluster.slots import Resources
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.studies.catalog import STUDIES
from bit_ray.tracking.config import TrackingConfig


@pytest.fixture(autouse=True, scope="module")
def one_trial_at_a_time() -> Iterator[None]:
    """The shared Ray has more CPUs by name, and a process for each of them only loads PyTorch."""
    gc.collect()  # an error of an earlier test may hold actors with their CPUs in a cycle of references
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resources, "num_slots", 1)
        yield


@pytest.fixture
def two_trials_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two cores."""
    monkeypatch.setattr(Resources, "num_slots", 2)


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of runs for all tests that do not ask where it is: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('recorded')}/mlflow.db"


@pytest.fixture
def tracking(mlflow_store: str, tmp_path: Path) -> TrackingConfig:
    """An experiment of the test's own in it."""
    return TrackingConfig(uri=mlflow_store, experiment=tmp_path.name)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The study of `tiny_study`, in the catalog of this process."""
    monkeypatch.setitem(STUDIES, "tiny", TINY)


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 glyphs of 6 classes to train on, and 30 others to measure on."""
    folder = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 20), ("val", 5)):
        source = GlyphSource("s", split=split, examples_per_class=count)
        write_shards(
            iter(source.part(range(6 * count))), folder / split, name=split, class_names=source.class_names[:6]
        )
    return folder
