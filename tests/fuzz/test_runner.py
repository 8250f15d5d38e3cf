"""The tier itself: what goes wrong is seen, and named with the input that did it."""

import re
from itertools import count

import pytest
from fuzz import runner
from fuzz.broken import WAYS
from fuzz.mutate import damaged, damaged_json, generator, pick
from fuzz.runner import fuzz

CAUSES = {
    "lines": "NotOneLine",
    "exception": "KeyError",
    "assertion": "an answer that is wrong",
    "abort": "SIGABRT",
    "spin": "more than 2 s of computing",
    "wait": "waits for more than 6 s",
    "grow": "more than 64 MiB of memory",
}


def number_of(way):
    """The first input of seed 0 that goes this way."""

    return next(number for number in count() if pick(generator(0, number), WAYS) == way)


@pytest.fixture
def report(tmp_path, monkeypatch):
    def run(*ways):
        return fuzz("fuzz.broken", tmp_path, seed=0, seconds=60, numbers=sorted(map(number_of, ways)))

    monkeypatch.setattr(runner, "IDLE_S", 6.0)  # a busy machine gives a second of computing later than that of a clock
    return run


def test_each_way_of_going_wrong_is_found_and_the_inputs_after_it_are_tried(report):
    found = report("value", "refusal", *CAUSES)
    assert (found.accepted, found.refused, found.tried) == (1, 1, 2 + len(CAUSES))
    for way, cause in CAUSES.items():
        [number] = [finding.first for name, finding in found.findings.items() if name.startswith(cause)]
        assert number == number_of(way)
        assert f"--fuzz-input broken:{number}" in str(found)


@pytest.mark.parametrize("way", ["delete", "create"])
def test_what_changes_outside_the_folder_of_an_input_is_found_and_put_back(report, way):
    found = report("value", way, "refusal")
    [finding] = found.findings.values()
    assert finding.first == number_of(way)
    assert ("canary/kept/deep.txt" in finding.message) == (way == "delete")
    assert (found.accepted, found.refused) == (1, 1)


def test_the_files_of_an_input_that_went_wrong_are_kept_with_the_place(report, tmp_path):
    [finding] = report("exception").findings.values()
    [kept] = [path for path in tmp_path.iterdir() if path.is_dir()]
    rng = generator(0, finding.first)
    assert pick(rng, WAYS) == "exception"
    assert (kept / "input").read_bytes() == rng.bytes(8)
    assert re.search(r'broken.py", line \d+, in _go', (kept / "trace.txt").read_text())


def test_an_input_is_a_function_of_seed_and_number_alone():
    tree = {"a": [1, 2.5, "x", {"b": None}], "c": "../d"}

    def made(seed, number):
        rng = generator(seed, number)
        return damaged(rng, bytes(range(256))), damaged_json(rng, tree)

    inputs = [made(seed, number) for seed in range(3) for number in range(300)]
    assert inputs == [made(seed, number) for seed in range(3) for number in range(300)]
    assert len(set(inputs)) > 800
