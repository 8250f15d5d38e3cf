"""Our network and weight files against timm's, an independent implementation that reads the authors' files."""

import pytest
import timm
import torch
from timm.layers import StdConv2d as TimmStdConv2d

from bit_ray.models.zoo import create_model
from bit_ray.weights.npz import load_npz, save_npz

NUM_CLASSES = 10


def _randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".gn" in name or name.startswith("gn"):
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                # Uneven filters: a mean of their own, so that a missing standardization would show.
                parameter.copy_(0.05 * noise + 0.02)


@pytest.fixture(scope="module", params=[("R50x1", "resnetv2_50x1_bit"), ("R101x1", "resnetv2_101x1_bit")])
def pair(request, tmp_path_factory):
    """(ours, timm's) with the weights of one file, which a third network wrote."""
    ours_name, timm_name = request.param
    path = tmp_path_factory.mktemp("npz") / "model.npz"
    written = create_model(ours_name, NUM_CLASSES)
    _randomise(written)
    save_npz(written, path)

    ours = create_model(ours_name, NUM_CLASSES)
    load_npz(ours, path)
    theirs = timm.create_model(timm_name, pretrained=False, num_classes=NUM_CLASSES)
    theirs.load_pretrained(str(path))
    for module in theirs.modules():
        if isinstance(module, TimmStdConv2d):
            module.eps = 1e-10  # the authors' value; timm's own, 1e-8, would differ by 2e-6 at these weights
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("size", [(224, 224), (161, 193)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
def test_logits_equal_timms(pair, size, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in pair)
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1
    with torch.inference_mode():
        expected, logits = theirs(x), ours(x)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert expected.std() > 0.1
    assert difference <= tolerance


def test_pooled_features_equal_timms(pair):
    ours, theirs = (model.to(torch.float64) for model in pair)
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(ours.forward_features(x), expected, rtol=1e-9, atol=1e-9)
