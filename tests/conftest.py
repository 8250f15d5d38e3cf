"""What holds for every test: nothing of the user's shell reaches it, and nothing of it reaches the outside."""

import importlib.util
import os
import shutil

import hosts
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
    group = parser.getgroup("hosts", "tests/integration/training/test_hosts.py")
    group.addoption("--all-faults", action="store_true", help="The rest of its story, too: three more minutes.")


@pytest.fixture
def extension():
    """The C extension; tests that ask for it are left out where it was not built."""
    from bit_ray.data.images import _jpeg

    return _jpeg


LEFT_OUT = pytest.StashKey[dict[str, int]]()
EXTENSION = (
    "tests of the C extension were left out: it was not built, as a C compiler or libjpeg's headers were missing "
    "(Debian: gcc python3-dev libjpeg62-turbo-dev)"
)
BROWSER = "tests of pages were left out: no browser (Debian: chromium chromium-driver)"
HOSTS = f"tests of several hosts were left out: {hosts.MISSING}"
PROMETHEUS = "tests of the files for Prometheus were left out: there is no such program (Debian: prometheus)"


def pytest_collection_modifyitems(config, items):
    """Leave out tests that this machine cannot run: of a GPU, the C extension, pages, files for Prometheus, hosts."""
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    missing = {}
    if importlib.util.find_spec("bit_ray.data.images._jpeg") is None:
        missing[EXTENSION] = [item for item in items if "extension" in item.fixturenames]
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        missing[BROWSER] = [item for item in items if item.get_closest_marker("browser")]
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        missing[PROMETHEUS] = [item for item in items if item.get_closest_marker("prometheus")]
    on_hosts = [item for item in items if item.get_closest_marker("hosts")]
    if on_hosts and not hosts.possible():
        missing[HOSTS] = on_hosts
    left_out = [item for found in missing.values() for item in found]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = {reason: len(found) for reason, found in missing.items() if found}


def pytest_sessionfinish(session):
    """Have one of several processes tell the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take it, where this is the process that prints."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    """Print how many tests were left out, and why."""
    for reason, count in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"{count} {reason}", yellow=True)
