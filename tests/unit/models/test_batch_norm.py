import pytest
import torch
from torch import nn

from bit_ray.errors import ModelError
from bit_ray.models.batch_norm import BatchNormReLU, update_running
from bit_ray.models.network import Network
from bit_ray.models.resnet import PlainConv2d, StdConv2d
from bit_ray.models.zoo import create_model, model_config
from bit_ray.weights.naming import check_bit
from bit_ray.weights.package import ModelSpec, load_package, save_package

YES = torch.tensor(True)


@pytest.mark.parametrize("over_workers", [False, True])
def test_it_is_torchs_batch_norm_with_the_running_statistics_moved_afterwards(over_workers):
    torch.manual_seed(0)
    ours, theirs = BatchNormReLU(5, over_workers=over_workers), nn.BatchNorm2d(5)
    with torch.no_grad():
        for layer in (ours, theirs):
            layer.weight.copy_(torch.linspace(0.5, 1.5, 5))
            layer.bias.copy_(torch.linspace(-0.2, 0.2, 5))
    for _ in range(3):
        x = torch.randn(6, 5, 4, 3) * 2 + 1
        mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(mine), theirs(reference).relu()
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad, reference.grad)
        update_running(ours, 1, YES)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x).relu())


def test_running_statistics_move_once_per_step_by_the_mean_of_the_groups():
    torch.manual_seed(0)
    layer, groups = BatchNormReLU(3, over_workers=False), torch.randn(4, 8, 3, 2, 2).unbind()
    for group in groups:
        layer(group)
    assert torch.equal(layer.running_mean, torch.zeros(3))  # nothing yet
    update_running(layer, 4, YES)
    means = torch.stack([group.mean(dim=(0, 2, 3)) for group in groups]).mean(0)
    variances = torch.stack([group.var(dim=(0, 2, 3)) for group in groups]).mean(0)
    torch.testing.assert_close(layer.running_mean, 0.1 * means)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * variances)


def test_a_step_that_is_not_finite_leaves_the_running_statistics_alone():
    layer = BatchNormReLU(3, over_workers=False)
    layer(torch.full((2, 3, 2, 2), torch.nan))
    update_running(layer, 1, torch.tensor(False))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.seen is None


def test_a_frozen_layer_normalises_by_its_running_statistics_and_keeps_them():
    layer = BatchNormReLU(3, over_workers=False).requires_grad_(False)
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(layer(x), ((x - 1) / 2).relu(), rtol=1e-4, atol=1e-5)
    assert layer.seen is None


@pytest.mark.parametrize(
    ("suffix", "norm", "standardized", "statistics"),
    [
        ("", "gn", True, "none"),
        ("-nows", "gn", False, "none"),
        ("-bn", "bn", True, "group"),
        ("-bn-nows", "bn", False, "group"),
        ("-syncbn", "syncbn", True, "batch"),
        ("-syncbn-nows", "syncbn", False, "batch"),
    ],
)
def test_the_name_says_which_network_of_the_ablation_it_is(suffix, norm, standardized, statistics):
    config = model_config(f"R1-1-1-1x0.5{suffix}", 4)
    assert (config.norm, config.standardize, config.batch_statistics) == (norm, standardized, statistics)
    model = create_model(f"R1-1-1-1x0.5{suffix}", 4)
    kinds = {type(module) for module in model.convolutions()}
    assert kinds == {StdConv2d if standardized else PlainConv2d}
    assert len(model.norms()) == 13
    plain = create_model("R1-1-1-1x0.5", 4)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def trained(name: str) -> Network:
    """A network whose head and running statistics are not those of the beginning."""
    torch.manual_seed(1)
    model = create_model(name, 4)
    nn.init.normal_(model.head.weight, std=0.1)
    model(torch.rand(4, 3, 32, 32) * 2 - 1)
    update_running(model, 1, YES)
    return model.eval()


@pytest.mark.parametrize("suffix", ["-nows", "-bn", "-syncbn-nows"])
def test_it_is_saved_loaded_and_baked_as_any_network(tmp_path, suffix):
    model = trained(f"R1-1-1-1x0.5{suffix}")
    spec = ModelSpec(
        model=f"R1-1-1-1x0.5{suffix}", num_classes=4, class_names=("a", "b", "c", "d"), multi_label=False,
        resize_mode="square", resize_size=32, crop_size=32,
    )  # fmt: skip
    save_package(tmp_path / "saved", model, spec)
    loaded, _ = load_package(tmp_path / "saved")
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        expected = model(x)
        # The last bits may differ: kernels depend on where in memory the weights lie.
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.baked()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["-nows", "-bn", "-syncbn"])
def test_other_programs_have_no_name_for_it(suffix):
    with pytest.raises(ModelError, match="^x: not a BiT ResNet with GroupNorm and Weight Standardization"):
        check_bit(model_config(f"R50x1{suffix}", 4), "x")
