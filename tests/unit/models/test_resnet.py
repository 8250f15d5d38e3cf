import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bit_ray.errors import ConfigError
from bit_ray.models.resnet import Bottleneck, ResNetConfig, StdConv2d, standardize
from bit_ray.models.zoo import create_model


def _standardize64(weight):
    """The definition, step by step, in float64."""
    flat = weight.double().flatten(1)
    mean = flat.sum(1, keepdim=True) / flat.shape[1]
    variance = ((flat - mean) ** 2).sum(1, keepdim=True) / flat.shape[1]
    return ((flat - mean) / (variance + 1e-10).sqrt()).view_as(weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4, 1e-5])
def test_standardization_is_the_papers_formula_with_1e_10_inside_the_root(scale, memory_format):
    torch.manual_seed(0)
    weight = (torch.randn(8, 16, 3, 3) * scale + scale / 2).to(memory_format=memory_format)
    expected = _standardize64(weight)
    assert (standardize(weight) - expected).abs().max() < 2e-5
    torch.testing.assert_close(standardize(weight.double()), expected, rtol=1e-12, atol=1e-12)
    assert standardize(weight).is_contiguous(memory_format=memory_format)


def test_gradient_flows_through_the_standardization():
    torch.manual_seed(0)
    conv = StdConv2d(4, 6, 3, stride=2).double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    conv(x).backward(upstream)

    weight = conv.weight.detach().clone().requires_grad_()
    x_reference = x.detach().clone().requires_grad_()
    functional.conv2d(x_reference, _standardize64(weight), stride=2, padding=1).backward(upstream)
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, x_reference.grad, rtol=1e-9, atol=1e-12)
    # A function invariant to scale and shift has no gradient along either; for the scale up to the 1e-10.
    assert (conv.weight.grad * weight).sum().abs() < 1e-8 * conv.weight.grad.norm() * weight.norm()
    assert conv.weight.grad.sum(dim=(1, 2, 3)).abs().max() < 1e-10


def test_scale_of_the_kernels_does_not_change_the_output():
    torch.manual_seed(0)
    model = create_model("R1-1-1-1x0.5", 3).double()
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StdConv2d):
                module.weight.mul_(3.0)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert before.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_standardization_stays_float32_under_autocast(dtype):
    torch.manual_seed(0)
    conv = StdConv2d(8, 16, 3)
    # Standardized in fp16, these weights would be lost in the rounding: their deviation is a 1/1000 of their mean.
    conv.weight.data = 0.05 + 5e-5 * torch.randn_like(conv.weight)
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", dtype):
        y = conv(x)
        inside = standardize(conv.weight)
    assert y.dtype == dtype
    assert inside.dtype == torch.float32
    assert torch.equal(inside, standardize(conv.weight))
    exact = functional.conv2d(x.double(), _standardize64(conv.weight.detach()), padding=1)
    rounding = torch.finfo(dtype).eps
    assert (y.double() - exact).abs().max() < 4 * rounding * exact.abs().max()
    lowered = _standardize64(conv.weight.detach().to(dtype))
    assert (lowered - _standardize64(conv.weight.detach())).abs().max() > 0.1


def test_half_precision_weights_are_standardized_in_float32():
    torch.manual_seed(0)
    weight = (1e-3 * torch.randn(4, 64, 1, 1)).half()
    assert standardize(weight).dtype == torch.float32
    assert (standardize(weight) - _standardize64(weight)).abs().max() < 1e-5


def test_the_pool_pads_with_zeros_and_differs_from_the_usual_one_only_at_the_border():
    torch.manual_seed(0)
    model = create_model("R1-1-1-1x0.5", 3)
    x = torch.randn(2, 32, 112, 112) - 1.0
    ours = model.pool(x)
    usual = functional.max_pool2d(x, 3, stride=2, padding=1)
    assert ours.shape == usual.shape == (2, 32, 56, 56)
    assert torch.equal(ours[:, :, 1:, 1:], usual[:, :, 1:, 1:])
    border = torch.ones(56, 56, dtype=torch.bool)
    border[1:, 1:] = False
    assert torch.equal(ours[..., border], usual[..., border].clamp(min=0.0))
    assert (ours != usual).any()


def test_the_projection_sees_the_pre_activated_input_and_the_identity_the_raw_one():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 9, 9, dtype=torch.float64)
    projecting = Bottleneck(32, 128, stride=2).double()
    torch.nn.init.zeros_(projecting.conv3.weight)  # a zero kernel standardizes to zero: only the shortcut is left
    torch.nn.init.normal_(projecting.gn1.weight)
    torch.nn.init.normal_(projecting.gn1.bias)
    gn = functional.group_norm(x, 32, projecting.gn1.weight, projecting.gn1.bias, eps=1e-5)
    expected = functional.conv2d(gn.relu(), _standardize64(projecting.proj.weight), stride=2)
    torch.testing.assert_close(projecting(x), expected, rtol=1e-9, atol=1e-9)

    plain = Bottleneck(32, 32 * 4, stride=1).double()
    assert plain.proj is not None
    identity = Bottleneck(128, 128, stride=1).double()
    torch.nn.init.zeros_(identity.conv3.weight)
    x = torch.randn(2, 128, 5, 5, dtype=torch.float64)
    assert identity.proj is None
    assert torch.equal(identity(x), x)


def test_intermediate_features_have_their_strides_and_end_in_the_pooled_vector():
    torch.manual_seed(0)
    model = create_model("R2-1-1-1x0.5", 3)
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_intermediates(x)
    assert {name: tuple(feature.shape[1:]) for name, feature in features.items()} == {
        "stem": (32, 16, 24),
        "stage1": (128, 16, 24),
        "stage2": (256, 8, 12),
        "stage3": (512, 4, 6),
        "stage4": (1024, 2, 3),
        "pre_logits": (1024,),
    }
    assert model.num_features == 1024
    assert torch.equal(features["pre_logits"], model.forward_features(x))


def test_channels_last_gives_the_same_logits():
    torch.manual_seed(0)
    model = create_model("R1-1-1-1x0.5", 3)
    torch.nn.init.normal_(model.head.weight)
    x = torch.randn(2, 3, 48, 40)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)


def test_a_new_and_a_reset_head_are_zero_and_of_the_models_type():
    model = create_model("R1-1-1-1x0.5", 7).to(torch.bfloat16)
    assert model.head.weight.abs().sum() == 0
    torch.nn.init.normal_(model.head.weight)
    model.reset_head(3)
    assert model.config.num_classes == 3
    assert model.head.weight.shape == (3, 1024)
    assert model.head.weight.dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).tolist() == [[0.0, 0.0, 0.0]]


def test_kernels_start_from_a_normal_over_the_fan_in():
    torch.manual_seed(0)
    conv = StdConv2d(64, 64, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(1, 3, 31, 224), "31x224 pixels; accepted: at least 32x32"),
        (torch.zeros(1, 32, 32, 3), "[1, 32, 32, 3] float32; accepted: [B, 3, H, W]"),
        (torch.zeros(3, 32, 32), "[3, 32, 32] float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8; accepted: [B, 3, H, W] floating point in [-1, 1]"),
    ],
)
def test_input_the_network_cannot_take_is_refused(x, said):
    model = create_model("R1-1-1-1x0.5", 3)
    with pytest.raises(ConfigError) as error:
        model(x)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 0.75}, "width: 0.75; accepted: a positive multiple of 0.5"),
        ({"width": 0.0}, "width: 0;"),
        ({"width": float("nan")}, "width: nan;"),
        ({"units": (3, 4, 6)}, "units: (3, 4, 6); accepted: four whole numbers"),
        ({"units": (3, 4, 0, 3)}, "units: (3, 4, 0, 3);"),
        ({"num_classes": 0}, "num_classes: 0; accepted: at least 1; for features alone use forward_features"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(settings, said):
    with pytest.raises(ConfigError, match=r"^\w+: .+; .+; .+") as error:
        ResNetConfig(**({"units": (1, 1, 1, 1), "width": 0.5, "num_classes": 2} | settings))
    assert said in str(error.value)


def kept_and_learned(model, images):
    """Bytes that a forward pass keeps besides weights and images, gradients, and multiply-adds of both passes."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    for tensor in (*model.parameters(), images):
        kept.pop(tensor.untyped_storage()._cdata, None)
    with FlopCounterMode(display=False) as counter:
        model(images).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return sum(storage.nbytes() for storage in kept.values()), gradients, counter.get_total_flops()


def test_kernels_that_are_standardized_again_are_not_kept_and_cost_no_convolution():
    torch.manual_seed(0)
    model = create_model("R1-1-1-1x0.5", 5)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    kept, gradients, flops = kept_and_learned(model, images)
    model.recompute_kernels()
    kept_now, gradients_now, flops_now = kept_and_learned(model, images)
    kernels = sum(4 * module.weight.numel() for module in model.convolutions())
    assert kept - kept_now > 0.9 * kernels
    assert flops_now == flops
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_now, strict=True))
