"""A training of a study in this process: what it measures, and that a killed one continues where it was."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bit_ray import store
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.errors import ConfigError
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.studies import in_memory, measures
from bit_ray.studies.cells import Cell, Part, Probe, load_cell
from bit_ray.studies.in_memory import carry_out
from bit_ray.training.plan import transfer_plan

MODEL = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Part:
    folder = tmp_path_factory.mktemp("digits")
    source = DigitsSource("train")
    write_shards(iter(source.part(np.arange(120))), folder / "set", name="digits", class_names=source.class_names)
    return Part(str(folder / "set"), read_manifest(folder / "set").digest)


def cell_of(digits: Part, **changes) -> Cell:
    rows, val = tuple(range(0, 120, 2)), tuple(range(1, 120, 2))
    settings = {"resize": 36, "crop": 32, "num_steps": 12, "batch_size": 8, "base_lr": 0.01, "random_flip": False}
    settings |= {"weight_decay": 1e-3, "dropout": 0.2, "mixup_alpha": 0.1}
    rule = hyperrule(len(rows), (32, 32), **settings | {k: v for k, v in changes.items() if k in settings})
    plan = transfer_plan(
        rule, model=MODEL, num_classes=10, manifest_digest=digits.digest, init="", init_digest="", seed=1
    )
    cell = Cell(
        plan=plan,
        train=replace(digits, rows=rows),
        at_steps=(3, 6),
        parts={"val": replace(digits, rows=val)},
        probe=Probe(replace(digits, rows=rows[:30]), 3, replace(digits, rows=val)),
        norms=True,
    )
    return replace(cell, **{k: v for k, v in changes.items() if k not in settings})


def test_a_cell_is_measured_where_it_was_asked_for_and_at_the_end(digits, tmp_path):
    score = carry_out({}, cell_of(digits), str(tmp_path), 0.0, 1)
    assert [point.step for point in score.points] == [3, 6, 12]
    names = {"val/loss", "val/top_1", "probe/top_1", "turn", "train/loss", *(f"norm/stage{i}" for i in (1, 2, 3, 4))}
    assert all(set(point.values) == names for point in score.points)
    assert score.final == score.points[-1].values
    assert [step for step, _ in score.losses] == list(range(1, 13))
    assert score.losses[0][1] == pytest.approx(np.log(10), rel=1e-5)
    assert score.images == 96
    assert score.decay_exposure == pytest.approx(sum(map(cell_of(digits).plan.schedule.lr_at, range(12))) * 1e-3 / 0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_was_killed_continues_to_the_same_weights_and_measures(digits, tmp_path, monkeypatch):
    whole = carry_out({}, cell_of(digits), str(tmp_path / "whole"), 60.0, 1)
    begun = []

    class Killed(BaseException):
        pass

    after = in_memory._Watch.after

    def dying(self, learner, step, loss):
        after(self, learner, step, loss)
        begun.append(step)
        if step == 7 and begun.count(7) == 1:
            raise Killed

    monkeypatch.setattr(in_memory._Watch, "after", dying)
    with pytest.raises(Killed):
        carry_out({}, cell_of(digits), str(tmp_path / "killed"), 0.0, 1)
    assert len(list((tmp_path / "killed").glob("step-*"))) == 1
    torch.manual_seed(99)  # nothing of the process that begins is left
    score = carry_out({}, cell_of(digits), str(tmp_path / "killed"), 0.0, 1)
    assert begun == [*range(8), *range(8, 12)]
    assert score.losses == whole.losses
    assert [p.values for p in score.points] == [p.values for p in whole.points]
    assert list((tmp_path / "killed").iterdir()) == []


def test_a_half_written_checkpoint_is_passed_over(digits, tmp_path, monkeypatch):
    save = in_memory.save_checkpoint

    def dying(directory, *arguments):
        save(directory, *arguments)
        if arguments[-1].next_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(in_memory, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        carry_out({}, cell_of(digits), str(tmp_path), 0.0, 1)
    monkeypatch.setattr(in_memory, "save_checkpoint", save)
    first = []
    begin = in_memory._Watch.begin
    monkeypatch.setattr(in_memory._Watch, "begin", lambda self, learner: first.append(begin(self, learner)) or first[0])
    carry_out({}, cell_of(digits), str(tmp_path), 0.0, 1)
    assert first == [4]
    assert list(tmp_path.iterdir()) == []


def test_a_cell_that_is_not_among_the_best_at_a_rung_ends_itself_and_goes_on_as_it_was_decided(digits, tmp_path):
    rungs = str(tmp_path / "rungs")
    whole = carry_out({}, cell_of(digits), str(tmp_path / "cells" / "whole"), 60.0, 1)
    alone = carry_out({}, cell_of(digits, rungs=rungs), str(tmp_path / "cells" / "alone"), 0.0, 1)
    assert (alone.stopped_at, alone.final, alone.losses) == (0, whole.final, whole.losses)
    assert alone.identity != whole.identity
    assert sorted(path.parent.name for path in Path(rungs).rglob("alone.json")) == ["0", "1"]
    # Another one has done better at the second rung.
    store.write_json(f"{rungs}/0/other.json", {"score": 0.0})
    store.write_json(f"{rungs}/1/other.json", {"score": 1.0})
    ended = carry_out({}, cell_of(digits, rungs=rungs), str(tmp_path / "cells" / "ended"), 0.0, 1)
    assert (ended.stopped_at, ended.images, ended.diverged) == (6, 48, False)
    assert [point.step for point in ended.points] == [3, 6]
    assert ended.final == ended.points[-1].values
    assert [p.values for p in ended.points] == [p.values for p in whole.points[:2]]
    assert list((tmp_path / "cells").rglob("*.json")) == []


def test_a_diverged_training_is_a_result_with_no_loss_and_no_accuracy(digits, tmp_path):
    score = carry_out({}, cell_of(digits, base_lr=1e30, test=digits), str(tmp_path), 0.0, 1)
    assert score.diverged
    assert score.final == {"val/top_1": 0.0, "test/top_1": 0.0}


def test_the_test_set_is_read_once_and_only_at_the_end(digits, tmp_path, monkeypatch):
    test = replace(digits, rows=(1, 3, 5))
    read = []
    views = measures._views.__wrapped__
    monkeypatch.setattr(measures, "_views", lambda part, *rest: read.append(part) or views(part, *rest))
    score = carry_out({}, cell_of(digits, test=test), str(tmp_path), 0.0, 1)
    assert read.count(test) == 1
    assert read[-1] == test
    assert 0 <= score.final["test/top_1"] <= 1
    assert not any("test/top_1" in point.values for point in score.points)


def test_a_score_counts_only_for_its_own_cell(digits, tmp_path):
    from dataclasses import asdict

    from bit_ray import store

    cell = cell_of(digits)
    score = carry_out({}, cell, str(tmp_path / "cell"), 0.0, 1)
    uri = str(tmp_path / "score.json")
    assert load_cell(uri, cell.identity) is None
    store.write_json(uri, asdict(score))
    assert load_cell(uri, cell.identity) == score
    for other in (replace(cell, norms=False), replace(cell, test=digits), replace(cell, at_steps=(3,))):
        assert load_cell(uri, other.identity) is None
    moved = replace(cell, train=replace(cell.train, shards="/another/place"))
    assert load_cell(uri, moved.identity) == score


def test_a_set_too_large_for_memory_is_refused_before_it_is_read(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "_MAX_EXAMPLE_BYTES", 1000)
    in_memory._examples.cache_clear()
    with pytest.raises(ConfigError, match=r"^where: memory, but .* has 60 images .*; use where cluster$"):
        carry_out({}, cell_of(digits), str(tmp_path), 0.0, 1)
    assert list(Path(tmp_path).iterdir()) == []
