"""How long and with what seed inputs are tried, and how many it were."""

from collections.abc import Callable

import pytest
from fuzz.report import Report
from fuzz.runner import ALL, fuzz

_REPORTS = pytest.StashKey[list[Report]]()
_SLACK_S = 240
"""For starting, making valid inputs and the last input."""


def pytest_configure(config):
    config.stash[_REPORTS] = []


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if "try_inputs" in getattr(item, "fixturenames", ())]
    for item in mine:
        item.add_marker(pytest.mark.timeout(config.getoption("minutes") * 60 + _SLACK_S))
    if wanted := config.getoption("fuzz_input").partition(":")[0]:
        others = [item for item in items if item not in mine or item.callspec.params["kind"] != wanted]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)


@pytest.fixture
def try_inputs(request, tmp_path) -> Callable[[str, int], Report]:
    """Try the share of the time of one of so many kinds, or the one input that is asked for."""
    seed, wanted = (request.config.getoption(name) for name in ("fuzz_seed", "fuzz_input"))

    def run(kind: str, num_kinds: int) -> Report:
        number = int(wanted.partition(":")[2] or 0)
        numbers = range(number, number + 1) if wanted else ALL
        seconds = request.config.getoption("minutes") * 60 / num_kinds
        report = fuzz(f"fuzz.kinds.{kind}", tmp_path, seed=seed, seconds=seconds, numbers=numbers)
        request.config.stash[_REPORTS].append(report)
        return report

    return run


def pytest_terminal_summary(terminalreporter, config):
    reports = config.stash[_REPORTS]
    if reports:
        terminalreporter.section(f"inputs tried, seed {config.getoption('fuzz_seed')}")
        terminalreporter.write_line("| kind | tried | accepted | refused | causes of failure |")
        terminalreporter.write_line("| --- | ---: | ---: | ---: | ---: |")
        for r in sorted(reports, key=lambda report: report.kind):
            numbers = " | ".join(f"{n:,}" for n in (r.tried, r.accepted, r.refused, len(r.findings)))
            terminalreporter.write_line(f"| {r.kind} | {numbers} |")
