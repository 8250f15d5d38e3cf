import copy
import json
import pickle
import resource
import sys
import threading
import zipfile
from contextlib import contextmanager

import pytest
import torch

from bit_ray import store
from bit_ray.config import replace
from bit_ray.data.images.views import TrainView
from bit_ray.errors import ModelError, StoreError
from bit_ray.inference.classifier import load_model
from bit_ray.locks import scratch_directory
from bit_ray.models.zoo import create_model
from bit_ray.recipes.schedules import Schedule
from bit_ray.run_folder import TRAINING_FILE, RunFolder
from bit_ray.training.checkpoint.state import (
    Position,
    fetched,
    load_checkpoint,
    read_checkpoint_record,
    save_checkpoint,
    write_checkpoint,
)
from bit_ray.training.checkpoint.writer import CheckpointWriter
from bit_ray.training.optimizer import build_optimizer
from bit_ray.training.plan import TrainPlan
from bit_ray.training.step import TrainStep
from bit_ray.weights.package import ModelSpec, load_package

NUM_CLASSES = 7
PLAN = TrainPlan(
    kind="pretrain",
    model="R1-1-1-1x0.5",
    num_classes=NUM_CLASSES,
    manifest_digest="0" * 64,
    num_examples=640,
    view=TrainView(crop="inception", crop_size=32),
    resize_mode="square",
    resize_size=32,
    loss="softmax",
    schedule=Schedule(base_lr=0.1, num_steps=10),
    global_batch_size=8,
    weight_decay=0.01,
    mixup_alpha=0.2,
)
GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (
        torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=GENERATOR),
        torch.randint(0, NUM_CLASSES, (8,), generator=GENERATOR),
    )
    for _ in range(6)
]
SPEC = ModelSpec(
    model=PLAN.model,
    num_classes=NUM_CLASSES,
    class_names=tuple("abcdefg"),
    multi_label=False,
    resize_mode="square",
    resize_size=32,
    crop_size=32,
)


def make_model(seed=0):
    torch.manual_seed(seed)
    model = create_model(PLAN.model, NUM_CLASSES)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.to(memory_format=torch.channels_last)


def train(model, optimizer, start, stop, plan=PLAN):
    step_fn = TrainStep(model, optimizer, plan)
    for step in range(start, stop):
        step_fn(step, [BATCHES[step]], 1)
    step_fn.check()


@pytest.fixture
def trained():
    """A model, its optimizer, and what they are after three steps."""
    model = make_model()
    optimizer = build_optimizer(model, PLAN)
    train(model, optimizer, 0, 3)
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path, trained):
    model, optimizer = trained
    save_checkpoint(tmp_path, model, SPEC, optimizer, PLAN, Position(next_step=3, train_s=1.5))
    return tmp_path


def fresh(plan=PLAN):
    model = make_model(seed=99)
    return model, build_optimizer(model, plan)


def test_a_restored_run_ends_bit_for_bit_where_an_undisturbed_one_does(checkpoint, trained):
    model, optimizer = fresh()
    assert load_checkpoint(checkpoint, model, optimizer, PLAN) == Position(next_step=3, train_s=1.5)
    original, original_optimizer = trained
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(p, q)
        buffer = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(buffer, original_optimizer.state[q]["momentum_buffer"])
        assert buffer.abs().max() > 0
        assert buffer.stride() == p.stride()
    train(original, original_optimizer, 3, 6)
    train(model, optimizer, 3, 6)
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], original_optimizer.state[q]["momentum_buffer"])


def test_the_random_generator_is_restored(tmp_path, trained):
    model, optimizer = trained
    torch.manual_seed(7)
    save_checkpoint(tmp_path, model, SPEC, optimizer, PLAN, Position(next_step=3))
    expected = torch.rand(5)
    torch.rand(100)
    load_checkpoint(tmp_path, *fresh(), PLAN)
    assert torch.equal(torch.rand(5), expected)


def test_a_run_without_momentum_is_restored(tmp_path):
    plan = replace(PLAN, {"momentum": 0.0})
    model = make_model()
    optimizer = build_optimizer(model, plan)
    train(model, optimizer, 0, 2, plan)
    save_checkpoint(tmp_path, model, SPEC, optimizer, plan, Position(next_step=2))
    other, other_optimizer = fresh(plan)
    load_checkpoint(tmp_path, other, other_optimizer, plan)
    train(model, optimizer, 2, 4, plan)
    train(other, other_optimizer, 2, 4, plan)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_is_a_model(checkpoint, trained):
    model, spec = load_package(checkpoint)
    assert spec == SPEC
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[0].state_dict()[name])
    images, _ = BATCHES[0]
    expected = copy.deepcopy(trained[0]).eval()((images.permute(0, 3, 1, 2).float() - 127.5) / 127.5)
    torch.testing.assert_close(load_model(checkpoint).logits(images), expected.detach(), rtol=1e-4, atol=1e-5)


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoint):
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == ["model.json", "model.safetensors", "optimizer.safetensors", "training.json"]
    for path in checkpoint.iterdir():
        assert not zipfile.is_zipfile(path)
        with path.open("rb") as file, pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError)):
            pickle.load(file)


def refused(checkpoint, plan=PLAN):
    model, optimizer = fresh(plan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError) as caught:
        load_checkpoint(checkpoint, model, optimizer, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_plan_is_refused(checkpoint):
    other = replace(PLAN, {"weight_decay": 0.02})
    text = refused(checkpoint, other)
    assert PLAN.digest[:12] in text
    assert other.digest[:12] in text
    assert text.endswith("use another name for other settings")


@pytest.mark.parametrize("size", [0, 4, 100, -8])
def test_a_truncated_optimizer_file_is_refused(checkpoint, size):
    path = checkpoint / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused(checkpoint)


def test_a_missing_optimizer_file_is_refused(checkpoint):
    (checkpoint / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors" in refused(checkpoint)


def test_an_optimizer_file_of_another_network_is_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "optimizer.safetensors"
    tensors = load_file(path)
    del tensors["momentum.head.bias"]
    save_file(tensors, path)
    assert "['momentum.head.bias']" in refused(checkpoint)


def test_damaged_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in refused(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan_digest": "x"}', '{"plan_digest": "x", "progress": 3}'])
def test_a_damaged_position_is_refused(checkpoint, text):
    (checkpoint / "training.json").write_text(text)
    assert "not a training checkpoint" in refused(checkpoint)


@pytest.mark.parametrize("next_step", [-1, 11, 10**9])
def test_a_step_that_the_plan_has_not_is_refused(checkpoint, next_step):
    path = checkpoint / "training.json"
    path.write_text(path.read_text().replace('"next_step": 3', f'"next_step": {next_step}'))
    text = refused(checkpoint)
    assert f"progress.next_step: {next_step}; accepted: 0 to 10; start from an earlier checkpoint" in text


def test_a_directory_without_a_position_is_refused(tmp_path):
    assert "training.json" in refused(tmp_path)


def test_the_plan_stands_in_the_checkpoint(checkpoint):
    training = json.loads((checkpoint / "training.json").read_text())
    assert training["plan_digest"] == PLAN.digest
    assert training["plan"]["schedule"]["base_lr"] == 0.1
    assert training["progress"]["next_step"] == 3


class Learned:
    """What a writer reads of a learner."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.plan, self.device = model, optimizer, PLAN, torch.device("cpu")


@pytest.fixture
def writer(tmp_path):
    written = []
    writer = CheckpointWriter(RunFolder(str(tmp_path / "run")), SPEC, written.append)
    writer.written = written
    return writer


def test_what_is_written_behind_the_training_is_what_was_there_when_it_was_asked_for(writer, trained, tmp_path):
    model, optimizer = trained
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    writer.save(Learned(model, optimizer), Position(next_step=3), {"train/loss": 1.5}, wait=False)
    train(model, optimizer, 3, 6)
    writer.finish()
    other, other_optimizer = fresh()
    place = tmp_path / "run" / "step-00000003"
    assert load_checkpoint(place, other, other_optimizer, PLAN) == Position(next_step=3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    assert read_checkpoint_record(place).metrics == {"train/loss": 1.5}
    assert writer.written == [3]
    # The memory of the copy serves again.
    writer.save(Learned(model, optimizer), Position(next_step=6), {}, wait=True)
    load_checkpoint(tmp_path / "run" / "step-00000006", other, other_optimizer, PLAN)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000003", "step-00000006"]


def test_one_checkpoint_is_written_at_a_time_and_the_last_is_never_left_out(writer, trained, monkeypatch):
    going_on = threading.Event()

    def slowly(*arguments):
        assert going_on.wait(30)
        write_checkpoint(*arguments)

    monkeypatch.setattr("bit_ray.training.checkpoint.writer.write_checkpoint", slowly)
    learned = Learned(*trained)
    writer.save(learned, Position(next_step=3), {}, wait=False)
    writer.save(learned, Position(next_step=4), {}, wait=False)
    assert writer.num_skipped == 1
    going_on.set()
    writer.save(learned, Position(next_step=5), {}, wait=True)
    assert writer.written == [3, 5]


@contextmanager
def at_most(num_bytes):
    """No file may become larger, as if the disk were full then."""
    before, compiled = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # half of a compiled module would stay in the environment
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = compiled


def test_a_full_disk_keeps_the_checkpoint_before_it_and_says_so(writer, trained, tmp_path):
    learned = Learned(*trained)
    writer.save(learned, Position(next_step=3), {}, wait=True)
    with at_most(100_000):
        writer.save(learned, Position(next_step=6), {}, wait=False)
        writer._thread.join()
    with pytest.raises(StoreError) as caught:
        writer.check()
    assert str(caught.value) == (
        f"{tmp_path}/run/step-00000006: cannot be written (File too large); the checkpoint before it is kept; "
        "free some space or correct the permissions, and start the run again"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]
    load_checkpoint(tmp_path / "run" / "step-00000003", *fresh(), PLAN)


def test_a_checkpoint_is_deleted_with_its_mark_first(writer, trained, tmp_path, monkeypatch):
    writer.save(Learned(*trained), Position(next_step=3), {}, wait=True)
    folder = RunFolder(str(tmp_path / "run"))
    assert folder.checkpoints(TRAINING_FILE) == [3]

    def killed(uri):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "delete_directory", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.delete_checkpoint(3)
    assert folder.checkpoints(TRAINING_FILE) == []
    assert folder.abandoned() == []  # it may be one that is being written
    monkeypatch.undo()
    writer.save(Learned(*trained), Position(next_step=6), {}, wait=True)
    assert folder.abandoned() == [3]


def test_a_fetched_copy_stays_while_other_processes_remove_what_killed_ones_have_left(tmp_path, monkeypatch):
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / TRAINING_FILE).write_text("{}")
    monkeypatch.setattr(store, "is_local", lambda uri: False)  # as in an object store
    with fetched(str(tmp_path / "step")) as local:
        with scratch_directory():  # each removes what is not in use
            pass
        assert (local / TRAINING_FILE).read_text() == "{}"
    assert not local.exists()
