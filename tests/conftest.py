"""What holds for every test: nothing of the user's shell reaches it, and nothing of it reaches the outside."""

import os

import pytest

# Small tensors and two cores: one thread is faster, and the same numbers come out everywhere. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "tests/fuzz")
    group.addoption("--minutes", type=float, default=0.8, help="How long to try inputs, all kinds together.")
    group.addoption("--fuzz-seed", type=int, default=0, help="What decides the inputs, with their numbers.")
    group.addoption("--fuzz-input", default="", metavar="KIND:NUMBER", help="Try this one input.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Say what may run side by side with ``-n 2``: a file stays in one process, and so do all that share the Ray.

    The latter come first, as they take longest; the other process runs the other files meanwhile.
    """
    shared = {item.path for item in items if "ray_local" in item.fixturenames}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if item.path in shared else str(item.path)))
    items.sort(key=lambda item: item.path not in shared)
