import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bit_ray.data.images.views import TrainView
from bit_ray.errors import ConfigError
from bit_ray.models.resnet import standardize
from bit_ray.models.zoo import create_model
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.checkpoint.state import Position, load_checkpoint, save_checkpoint
from bit_ray.training.config import FinetuneConfig, parse_train
from bit_ray.training.device import to_channels_last
from bit_ray.training.optimizer import build_optimizer, kernel_norm
from bit_ray.training.parts import count_parameters, merge_adapters, merged, set_trainable
from bit_ray.training.plan import TrainPlan
from bit_ray.training.step import TrainStep
from bit_ray.weights.package import ModelSpec, load_package

NAME, NUM_CLASSES = "R1-1-2-1x0.5", 5
PARTS = ["all", "head", "stages:1", "stages:3", "norm_bias", "adapters:3"]


def make_plan(train, num_steps=6):
    return TrainPlan(
        kind="finetune",
        model=NAME,
        num_classes=NUM_CLASSES,
        manifest_digest="0" * 64,
        num_examples=64,
        train=train,
        view=TrainView(crop="resize", crop_size=32),
        resize_mode="square",
        resize_size=32,
        loss="softmax",
        schedule=Schedule(base_lr=0.05, num_steps=num_steps),
        global_batch_size=16,
    )


def make_model(train="all", seed=0):
    torch.manual_seed(seed)
    model = create_model(NAME, NUM_CLASSES)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    set_trainable(model, train)
    to_channels_last(model)
    return model


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, NUM_CLASSES, (16,), generator=generator)


def train_steps(model, optimizer, plan, steps):
    step_fn = TrainStep(model, optimizer, plan)
    for step in steps:
        step_fn(step, [make_batch(step)], 1)
    step_fn.check()


def is_trained(name, train):
    if name.startswith("head.") or train == "all":
        return True
    if train == "norm_bias":
        return "gn" in name
    if train == "adapters:3":
        return "gn" not in name
    if train.startswith("stages"):
        return name.startswith(
            ("gn.", "stages.3") if train == "stages:1" else ("gn.", "stages.1", "stages.2", "stages.3")
        )
    return False


@pytest.mark.parametrize("train", PARTS)
def test_what_is_trained_changes_and_nothing_else(train):
    plan, model = make_plan(train), make_model(train)
    before = copy.deepcopy(make_model().state_dict())
    train_steps(model, build_optimizer(model, plan), plan, range(3))
    for name, tensor in merged(model).state_dict().items():
        assert torch.equal(tensor, before[name]) is not is_trained(name, train), name


@pytest.mark.parametrize("train", PARTS)
def test_the_norm_is_that_of_the_trained_kernels(train):
    plan, model = make_plan(train), make_model(train)
    other = ("bias", ".original")  # a kernel with an adapter is frozen
    kernels = [
        p.detach().double()
        for name, p in model.named_parameters()
        if is_trained(name, train) and "gn" not in name and not name.endswith(other)
    ]
    expected = sum(p.square().sum() for p in kernels).sqrt()
    assert kernel_norm(build_optimizer(model, plan)) == pytest.approx(float(expected), rel=1e-5)


def gradients(model):
    images, targets = make_batch(0)
    x = images.permute(0, 3, 1, 2).double().sub(127.5).div(127.5)
    F.cross_entropy(model(x), targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", ["head", "stages:1", "stages:3", "norm_bias"])
def test_the_gradient_of_what_is_trained_is_that_of_full_training(train):
    full, part = gradients(make_model().double()), gradients(make_model(train).double())
    assert set(part) == {name for name in full if is_trained(name, train)}
    for name, gradient in part.items():
        torch.testing.assert_close(gradient, full[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("train", "untouched"), [("head", "gn"), ("stages:1", "stages.2"), ("stages:3", "stages.0")])
def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(train, untouched):
    model, needs = make_model(train), []
    model.get_submodule(untouched).register_forward_hook(
        lambda module, args, output: needs.append(output.requires_grad)
    )
    model(torch.zeros(1, 3, 32, 32))
    assert needs == [False]


def test_adapters_compute_the_same_at_first():
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(make_model("adapters:3")(x), make_model()(x), rtol=0, atol=0)


@pytest.mark.parametrize("rank", [4, 4096])
def test_the_first_step_of_an_adapter_is_the_full_step_on_its_directions(rank):
    full, adapted = make_model().double(), make_model(f"adapters:{rank}").double()
    start = {name: p.detach().clone() for name, p in full.named_parameters()}
    for model in (full, adapted):
        gradients(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    down = dict(adapted.named_parameters())["stages.2.1.conv2.parametrizations.weight.0.down"].detach()
    before, full_step = (
        tensor.permute(0, 2, 3, 1).flatten(1)
        for tensor in (start["stages.2.1.conv2.weight"], full.stages[2][1].conv2.weight.detach())
    )
    step = merged(adapted).stages[2][1].conv2.weight.permute(0, 2, 3, 1).flatten(1) - before
    assert step.norm() > 0
    torch.testing.assert_close(step, (full_step - before) @ down.T @ down, rtol=1e-5, atol=1e-9)
    assert torch.linalg.matrix_rank(step) <= rank


def trained_adapters():
    plan, model = make_plan("adapters:3"), make_model("adapters:3")
    train_steps(model, build_optimizer(model, plan), plan, range(4))
    return model


def test_merging_changes_nothing_and_leaves_an_ordinary_network():
    model, x = trained_adapters().eval().double(), torch.randn(3, 3, 48, 48).double()
    plain = merged(model)
    assert type(plain.root) is type(create_model(NAME, 1).root)
    assert plain.state_dict().keys() == create_model(NAME, NUM_CLASSES).state_dict().keys()
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-12)
    merge_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    kernel = plain.stages[0][0].conv2.weight
    spread = standardize(kernel).var(dim=(1, 2, 3), unbiased=False)
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=1e-5, atol=1e-5)


def test_an_adapter_stays_float32_under_autocast():
    model = trained_adapters()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.root.weight, merged(model).root.weight)


@pytest.mark.parametrize("train", PARTS)
def test_a_run_continues_from_its_checkpoint_as_if_it_had_not_stopped(train, tmp_path):
    plan = make_plan(train)
    whole = make_model(train)
    train_steps(whole, build_optimizer(whole, plan), plan, range(6))

    first = make_model(train)
    optimizer = build_optimizer(first, plan)
    train_steps(first, optimizer, plan, range(3))
    spec = ModelSpec(
        model=NAME,
        num_classes=NUM_CLASSES,
        class_names=tuple("abcde"),
        multi_label=False,
        resize_mode="square",
        resize_size=32,
        crop_size=32,
    )
    save_checkpoint(tmp_path, first, spec, optimizer, plan, Position(next_step=3))
    package, _ = load_package(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(package(x), first(x), rtol=1e-4, atol=1e-4)

    second = make_model(train, seed=7)  # other weights, as of a worker that has not been sent any
    optimizer = build_optimizer(second, plan)
    assert load_checkpoint(tmp_path, second, optimizer, plan).next_step == 3
    train_steps(second, optimizer, plan, range(3, 6))
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def r50_counts(rank):
    """(all, norms, adapters, stage 4) of a ResNet-50 without its head, from the layers of the paper's architecture."""
    norms = adapters = 0
    root = kernels = 64 * 147
    adapters += rank * (64 + 147)
    inputs, last = 64, 0
    for units, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True):
        last = 0
        for unit in range(units):
            layers = [(width, inputs), (width, 9 * width), (4 * width, width)]
            layers += [(4 * width, inputs)] if unit == 0 else []
            kernels += sum(o * i for o, i in layers)
            adapters += sum(rank * (o + i) for o, i in layers)
            norms += 2 * (inputs + 2 * width)
            last += sum(o * i for o, i in layers) + 2 * (inputs + 2 * width)
            inputs = 4 * width
    norms += 2 * 2048
    assert kernels + norms == 23_500_352
    return root, kernels + norms, norms, adapters, last + 2 * 2048


def test_parameters_are_counted_by_part():
    head = 2048 * 10 + 10
    root, trunk, norms, adapters, stage4 = r50_counts(8)
    expected = {
        "all": trunk,
        "head": 0,
        "norm_bias": norms,
        "stages:4": trunk - root,
        "stages:1": stage4,
        "adapters:8": adapters,
    }
    for train, number in expected.items():
        assert count_parameters("R50x1", 10, train) == (number + head, trunk + head), train


@pytest.mark.parametrize("train", ["", "heads", "stages", "stages:0", "stages:5", "stages:-1", "adapters:x", "head:1"])
def test_an_unknown_part_is_refused_in_one_line(train):
    for make in (
        lambda: parse_train(train),
        lambda: FinetuneConfig(name="a", shards="b", train=train),
        lambda: dataclasses.replace(make_plan("all"), train=train),
    ):
        with pytest.raises(ConfigError, match=r"^train: .*; accepted: all, head, norm_bias, stages:K .*; choose one$"):
            make()
