"""The notice of a spot machine's end, from a server that speaks as the clouds' metadata services.

A node whose machine gets one drains: `tests/integration/training/test_elastic.py`.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from metadata_service import Metadata, metadata, notice  # noqa: F401  # a fixture

SCRIPT = Path(__file__).resolve().parents[3] / "clusters" / "spot_notifier.py"


@pytest.fixture(scope="module")
def notifier() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_notifier", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_notice_has_the_seconds_that_are_left(notifier: ModuleType, metadata: Metadata) -> None:  # noqa: F811
    assert notifier.seconds_left("aws", metadata.address) is None
    assert notifier.seconds_left("gcp", metadata.address) is None
    metadata.aws, metadata.gcp = notice(120), "TRUE"
    assert 110 < notifier.seconds_left("aws", metadata.address) <= 115
    assert notifier.seconds_left("gcp", metadata.address) == 25
    metadata.aws = notice(-60)
    assert notifier.seconds_left("aws", metadata.address) == 1


def test_the_raylets_own_arguments_name_the_node(
    notifier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid, arguments in (
        (1, ["/sbin/init"]),
        (7, ["/x/ray/core/src/ray/raylet/raylet", "--node_id=ab12", "--other"]),
    ):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/cmdline").write_text("\0".join(arguments))
    monkeypatch.setattr(notifier, "Path", lambda path: tmp_path / path.removeprefix("/"))
    assert notifier.own_node() == "ab12"
