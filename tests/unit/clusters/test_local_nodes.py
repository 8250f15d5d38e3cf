import importlib
from pathlib import Path

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2 import autoscaler

FOLDER = Path(__file__).resolve().parents[3] / "clusters" / "local-autoscaling"


def test_a_type_that_was_refused_comes_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    for name, value in {"CLUSTER_DIR": str(tmp_path), "CLUSTER_PORT": "1", "CLUSTER_NOTICE_S": "1"}.items():
        monkeypatch.setenv(name, value)
    local_nodes = importlib.import_module("local_nodes")
    monitor = autoscaler.CloudResourceMonitor()  # as the autoscaler makes it
    (tmp_path / "refused-spot").touch()
    assert monitor.get_recoverable_resource_availabilities() == {}
    with pytest.raises(NodeLaunchException):
        local_nodes.LocalNodes({}, "local").create_node_with_resources_and_labels(
            {}, {TAG_RAY_USER_NODE_TYPE: "spot"}, 1, {"CPU": 2}, {}
        )
    assert monitor.get_recoverable_resource_availabilities() == {"spot": 0.0}
