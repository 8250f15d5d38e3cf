import json
import logging
import os
import subprocess
import sys

import pytest
from ray._common.formatters import JSONFormatter

from bit_ray import log_lines
from bit_ray.log_lines import JsonFormatter, JsonLines


@pytest.fixture
def about(monkeypatch):
    """Marks records for the length of a test."""
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(log_lines, "_about", dict.fromkeys(("run", "attempt", "rank", "step")))
    log_lines.mark_records()
    yield log_lines.about
    logging.setLogRecordFactory(before)


def record(text="it is so"):
    return logging.getLogger("someone.elses").makeRecord("someone.elses", logging.WARNING, "f.py", 7, text, (), None)


def test_what_any_logger_says_tells_run_attempt_rank_and_step_in_rays_json_and_in_ours(about):
    log_lines.mark_records()  # twice is once
    about(run="jft", attempt=2, rank=5)
    about(step=70)
    for formatter in (JSONFormatter(), JsonFormatter()):
        line = json.loads(formatter.format(record()))
        assert {name: line[name] for name in ("run", "attempt", "rank", "step")} == {
            "run": "jft", "attempt": 2, "rank": 5, "step": 70,
        }  # fmt: skip
        assert (line["message"], line["levelname"], line["lineno"]) == ("it is so", "WARNING", 7)
    with pytest.raises(AssertionError):
        about(epoch=3)


def test_each_printed_line_becomes_a_line_of_json_and_one_that_is_json_stays(about, tmp_path):
    about(run="jft", step=3)
    with (tmp_path / "lines").open("w") as file:
        stream = JsonLines(file, "INFO")
        print("first", "and", file=stream, end=" ")
        print("more\n\n  second", file=stream)
        logged = JsonFormatter().format(record())
        print(logged, file=stream)
        assert stream.fileno() == file.fileno()
        assert not stream.isatty()
    one, two, three = (tmp_path / "lines").read_text().splitlines()
    assert [json.loads(line)["message"] for line in (one, two)] == ["first and more", "  second"]
    assert json.loads(one)["run"] == "jft"
    assert three == logged


def test_a_mistake_is_one_line_of_json_where_ray_is_told_to_write_json():
    command = [sys.executable, "-m", "bit_ray.cli.main", "status", "--node-price", "-1"]
    environment = {**os.environ, "RAY_LOGGING_CONFIG_ENCODING": "JSON"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 2
    line = json.loads(done.stderr)
    assert line["levelname"] == "ERROR"
    assert line["message"].startswith("error: --node-price: -1.0; accepted: ")
