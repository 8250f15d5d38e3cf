import numpy as np
import pytest
import torch

from bit_ray.inference.classifier import Classifier
from bit_ray.inference.heat import class_activation, heat_maps
from bit_ray.models.zoo import create_model
from bit_ray.plots.heat import heat_picture
from bit_ray.weights.package import ModelSpec

MODEL = "R1-1-1-1x0.5"


def classifier(size, *, num_classes=3, multi_label=False):
    torch.manual_seed(0)
    network = create_model(MODEL, num_classes)
    torch.nn.init.normal_(network.head.weight)
    torch.nn.init.normal_(network.head.bias)
    spec = ModelSpec(
        model=MODEL, num_classes=num_classes, class_names=tuple(f"class {i}" for i in range(num_classes)),
        multi_label=multi_label, resize_mode="square", resize_size=size, crop_size=size,
    )  # fmt: skip
    return Classifier(network, spec)


def noise(size):
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_cells_of_a_large_view_add_up_to_the_logits(multi_label):
    model = classifier(128, multi_label=multi_label)
    cells = class_activation(model, noise(128), [2, 0])
    assert cells.shape == (2, 4, 4)
    logits, bias = model.logits(noise(128)[None])[0], model.model.head.bias.detach()
    if not multi_label:
        logits, bias = logits - logits.mean(), bias - bias.mean()
    expected = (logits - bias)[[2, 0]].numpy()
    np.testing.assert_allclose(cells.mean(dim=(1, 2)), expected, rtol=1e-4, atol=1e-4)  # sums of float32


@pytest.mark.parametrize(("row", "column"), [(64, 96), (96, 32)])
def test_a_cell_is_drawn_where_it_looks(row, column):
    model = classifier(160)
    gray = np.full((160, 160, 3), 127, np.uint8)
    spotted = gray.copy()
    spotted[row - 3 : row + 4, column - 3 : column + 4] = 255
    change = (model.feature_map(spotted[None]) - model.feature_map(gray[None]))[0].abs().sum(0)
    assert divmod(int(change.argmax()), 5) == (row // 32, column // 32)
    # The same of what is drawn: its peak is at the spot, not half a cell beside it.
    model.feature_map = lambda batch: change.expand(1, model.model.num_features, 5, 5)
    torch.nn.init.zeros_(model.model.head.weight)
    model.model.head.weight.data[0] = 1
    [heat] = heat_maps(model, gray, [0])
    assert heat.shape == (160, 160)
    assert np.unravel_index(heat.argmax(), heat.shape) == (row, column)


def test_in_a_small_view_the_region_that_decides_is_found_by_covering_it():
    model = classifier(32)
    centre = np.arange(32)[:, None], np.arange(32)[None]
    spot = ((abs(centre[0] - 15) < 4) & (abs(centre[1] - 22) < 4))[:, :, None]

    def logits(images):
        seen = torch.as_tensor((np.asarray(images) * spot).reshape(len(images), -1).sum(axis=1), dtype=torch.float32)
        return torch.stack([seen, torch.zeros_like(seen), torch.zeros_like(seen)], dim=1)

    model.logits = logits
    view = np.where(spot, 255, 30).repeat(3, axis=2).astype(np.uint8)
    [heat] = heat_maps(model, view, [0])
    assert heat.shape == (32, 32)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(row - 15) < 5
    assert abs(column - 22) < 5
    assert heat[:, :8].max() < heat.max() / 100


def test_the_picture_turns_orange_where_the_heat_is_and_pales_elsewhere():
    picture = np.full((60, 90, 3), (20, 120, 220), np.uint8)
    heat = np.array([[1.0, -5.0], [0.0, 0.0]])
    drawn = heat_picture(picture, heat).astype(int)
    assert drawn.shape == picture.shape
    red, green, blue = drawn[2, 2]
    assert red > 150 > blue
    red, green, blue = drawn[-2, -2]
    assert 20 < red < green < blue < 220
    assert (heat_picture(picture, -np.ones((2, 2))) == heat_picture(picture, np.zeros((2, 2)))).all()
