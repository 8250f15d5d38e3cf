"""Checkpoints that the workers of a training in shards write together."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from forked import run_ranks
from safetensors.torch import load_file, save_file
from small_training import CPU, EVEN, NUM_CLASSES, batch_of, pretrain_plan

from bit_ray.config import to_dict
from bit_ray.errors import ModelError, StoreError
from bit_ray.inference.classifier import load_model
from bit_ray.run_folder import RunFolder
from bit_ray.training.checkpoint.sharded import Parts
from bit_ray.training.checkpoint.state import Position, checkpoint_tensors, load_checkpoint, save_checkpoint
from bit_ray.training.checkpoint.writer import CheckpointWriter
from bit_ray.training.healing import NonFiniteError
from bit_ray.training.learner import Learner
from bit_ray.training.sharding import whole
from bit_ray.weights.package import ModelSpec, load_package, read_spec
from bit_ray.weights.tensor_files import TensorFile, Weights
from bit_ray.weights.write import write_weights

PLAN = replace(
    pretrain_plan(global_batch_size=EVEN, num_examples=640), decay_to_init=True, weight_decay=1e-2, momentum=0.9
)
SPEC = ModelSpec(
    model=PLAN.model,
    num_classes=NUM_CLASSES,
    class_names=tuple("abcdef"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
)


def make_learner(rank=0, num_workers=1):
    return Learner(PLAN, CPU, rank=rank, num_workers=num_workers, sharded=num_workers > 1)


def all_of(learner):
    """Everything that a checkpoint has, whole."""
    state, model = checkpoint_tensors(learner.model, learner.optimizer)
    return {name: whole(tensor).clone() for name, tensor in (state | model).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def step(learner, number):
    images, targets = batch_of(number)
    mine = slice(learner.slots.start, learner.slots.stop)
    learner.step(number, images[mine], targets[mine])
    learner.check()


def in_a_group(rank, num_workers, directory, name):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ready = f"file://{directory}/{name}.ready"
    torch.distributed.init_process_group("gloo", init_method=ready, rank=rank, world_size=num_workers)


def write_and_read(rank, directory):
    """Write a checkpoint with four workers, fail with another, and read with three and with two what there is."""
    in_a_group(rank, 4, directory, "write")
    learner = make_learner(rank, 4)
    for number in (1, 2):  # the head begins at zero, so the first step moves nothing else
        step(learner, number)
    expected = all_of(learner)
    saved = []
    # For the second one the third worker's storage is out of reach: a folder in a file.
    writers = [
        CheckpointWriter(RunFolder(f"{directory}/{name}"), SPEC, saved.append, Parts(rank, 4))
        for name in ("run", "expected.pt/run" if rank == 2 else "failed")
    ]
    if rank == 0:
        torch.save(expected, directory / "expected.pt")
    writers[0].save(learner, Position(next_step=3), {"train/loss": 1.5}, wait=False)
    step(learner, 3)  # what is written is what was there
    writers[0].finish()
    assert saved == [3]
    with pytest.raises(StoreError) as caught:
        writers[1].save(learner, Position(next_step=4), {}, wait=True)
    (directory / f"told-{rank}").write_text(str(caught.value))
    assert saved == [3]
    torch.distributed.destroy_process_group()
    for num_workers in (3, 2):
        if rank < num_workers:
            in_a_group(rank, num_workers, directory, f"read-{num_workers}")
            learner = make_learner(rank, num_workers)
            for place, expected in (("run/step-00000003", "expected"), ("unsharded", "one")):
                load_checkpoint(directory / place, learner.model, learner.optimizer, PLAN)
                assert_equal(all_of(learner), torch.load(directory / f"{expected}.pt"))
            step(learner, 3)  # and it goes on, but for a step that is not finite
            before = all_of(learner)
            learner.model.head.bias.data.fill_(float("inf"))
            with pytest.raises(NonFiniteError):
                step(learner, 4)
            learner.model.head.bias.data.fill_(0.0)
            assert_equal(all_of(learner), before | {"head.bias": torch.zeros(NUM_CLASSES)})
            if rank == 0:
                (directory / f"read-{num_workers}").touch()
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a checkpoint of four workers, and an unsharded one that they have read."""
    directory = tmp_path_factory.mktemp("sharded")
    learner = make_learner()
    for number in (4, 5):
        step(learner, number)
    (directory / "unsharded").mkdir()
    save_checkpoint(directory / "unsharded", learner.model, SPEC, learner.optimizer, PLAN, Position(next_step=5))
    torch.save(all_of(learner), directory / "one.pt")
    run_ranks(write_and_read, (directory,), 4)
    return directory


@pytest.fixture
def checkpoint(written, tmp_path):
    """A copy of the checkpoint of four workers."""
    copy = tmp_path / "step-00000003"
    copy.mkdir()
    for path in (written / "run" / "step-00000003").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_what_four_workers_wrote_is_read_by_three_two_and_one_bit_for_bit(written):
    """And what one wrote is read by three and two: that they did is what the files say."""
    assert [(written / f"read-{number}").exists() for number in (3, 2)] == [True, True]
    learner = make_learner()
    place = written / "run" / "step-00000003"
    assert load_checkpoint(place, learner.model, learner.optimizer, PLAN) == Position(next_step=3)
    assert_equal(all_of(learner), torch.load(written / "expected.pt"))
    assert not torch.equal(torch.load(written / "one.pt")["root.weight"], learner.model.root.weight)


def test_every_worker_writes_a_part_without_pickles(written):
    place = written / "run" / "step-00000003"
    numbers = [f"0000{number}-of-00004" for number in (1, 2, 3, 4)]
    parts = [f"{kind}-{number}.safetensors" for kind in ("model", "optimizer") for number in numbers]
    assert sorted(path.name for path in place.iterdir()) == sorted([*parts, "model.json", "training.json"])
    for path in place.iterdir():
        with path.open("rb") as file, pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError)):
            pickle.load(file)
    for kind in ("model", "optimizer"):
        sizes = [(place / f"{kind}-{number}.safetensors").stat().st_size for number in numbers]
        largest = max(tensor.nbytes for tensor in torch.load(written / "expected.pt").values())
        assert max(sizes) - min(sizes) <= largest + 10_000


def test_a_checkpoint_in_parts_is_a_model_and_makes_one_that_is_whole(written, tmp_path):
    place = written / "run" / "step-00000003"
    model, spec = load_package(place)
    assert spec == SPEC
    write_weights(model, spec, tmp_path / "whole", "package")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["model.json", "model.safetensors"]
    expected = torch.load(written / "expected.pt")
    for name, tensor in load_package(tmp_path / "whole")[0].state_dict().items():
        assert torch.equal(tensor, expected[name])
    images, _ = batch_of(0)
    assert torch.equal(load_model(place).logits(images[:4]), load_model(tmp_path / "whole").logits(images[:4]))


def test_a_worker_that_cannot_write_leaves_no_checkpoint_and_all_say_why(written):
    told = [(written / f"told-{rank}").read_text() for rank in range(4)]
    reason = f"{written}/expected.pt/run/step-00000004: cannot be written (Not a directory); the checkpoint before it"
    assert told[2].startswith(reason)
    assert told[0] == told[1] == told[3] == f"worker 2: {told[2]}"
    assert not (written / "failed" / "step-00000004" / "training.json").exists()
    assert not (written / "failed" / "step-00000004" / "model.json").exists()


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def described_anew(checkpoint):
    """Let both documents say what the files are now."""
    for name, kind in (("model.json", "model"), ("training.json", "optimizer")):
        parts = tuple(map(TensorFile.of, sorted(checkpoint.glob(f"{kind}-*"))))
        value = to_dict(Weights.in_parts(parts))
        entry = ("weights", value) if kind == "model" else ("optimizer", value["parts"])
        edit(checkpoint / name, lambda document, entry=entry: document.update([entry]))


def refused(checkpoint):
    learner = make_learner()
    before = all_of(learner)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(checkpoint, learner.model, learner.optimizer, PLAN)
    assert_equal(all_of(learner), before)
    text = str(caught.value)
    assert text.startswith(str(checkpoint))
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_parts_that_are_missing_or_damaged_are_refused(checkpoint, kind):
    path = checkpoint / f"{kind}-00002-of-00004.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{len(data) - 1} bytes; accepted: {len(data)}" in refused(checkpoint)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in refused(checkpoint)
    path.unlink()
    assert f"{path}: cannot be read" in refused(checkpoint)
    described_anew(checkpoint)
    assert {"model": "lacks", "optimizer": "missing or unknown entries"}[kind] in refused(checkpoint)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_tensors_that_are_there_twice_or_of_another_shape_are_refused(checkpoint, kind):
    first, second = (checkpoint / f"{kind}-0000{number}-of-00004.safetensors" for number in (1, 2))
    one, two = load_file(first), load_file(second)
    name = next(name for name in one if name != "rng.torch")
    save_file(two | {name: one[name]}, second)
    described_anew(checkpoint)
    assert f"{name!r} is in another part as well" in refused(checkpoint)
    save_file(two, second)
    save_file(one | {name: one[name][None]}, first)
    described_anew(checkpoint)
    assert f"{name} is {[1, *one[name].shape]}" in refused(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.append(parts[0]), "a file stands there twice"),
        (lambda parts: parts.extend(parts * 3000), "at most 10,000"),
        (lambda parts: parts.pop(), "other files than sha256 and num_bytes say"),
        (lambda parts: parts[0].update(file="../model.json"), "a plain file name"),
        (lambda parts: parts[0].update(file="model.json"), "a plain file name"),
        (lambda parts: parts[0].update(parts=[]), "parts"),
    ],
)
def test_a_description_of_odd_parts_is_refused(checkpoint, change, message):
    edit(checkpoint / "model.json", lambda document: change(document["weights"]["parts"]))
    with pytest.raises(ModelError) as caught:
        read_spec(checkpoint)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
