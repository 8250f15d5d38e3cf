import pytest
import torch

from bit_ray.errors import ConfigError
from bit_ray.models.resnet import ResNetConfig
from bit_ray.models.zoo import PUBLISHED, create_model, model_config, model_name

# Of the authors' network instantiated at each size: (trunk, with 1000 classes, with 21843 classes, tensors, features).
COUNTS = {
    "R26x1": (13_938_496, 15_987_496, 58_694_803, 81, 2048),
    "R50x1": (23_500_352, 25_549_352, 68_256_659, 153, 2048),
    "R101x1": (42_492_480, 44_541_480, 87_248_787, 306, 2048),
    "R50x3": (211_174_080, 217_319_080, 345_399_315, 153, 6144),
    "R152x1": (58_136_128, 60_185_128, 102_892_435, 459, 2048),
    "R152x2": (232_238_208, 236_335_208, 321_728_979, 459, 4096),
    "R101x3": (381_789_888, 387_934_888, 516_015_123, 306, 6144),
    "R152x4": (928_340_224, 936_533_224, 1_107_299_923, 459, 8192),
}


def test_every_published_name_has_its_counts():
    assert sorted(COUNTS) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    trunk, with_1000, with_21843, num_tensors, num_features = COUNTS[name]
    with torch.device("meta"):
        model = create_model(name, 1000)
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    assert sum(sizes.values()) == with_1000 == model_config(name, 1000).num_parameters
    assert sum(size for key, size in sizes.items() if not key.startswith("head.")) == trunk
    assert len(sizes) == num_tensors
    assert model.num_features == num_features
    with torch.device("meta"):
        model.reset_head(21843)
    assert sum(p.numel() for p in model.parameters()) == with_21843 == model.config.num_parameters


def test_the_free_form_spells_out_units_and_width():
    assert model_config("R1-2-3-1x0.5", 5) == ResNetConfig(units=(1, 2, 3, 1), width=0.5, num_classes=5)
    assert model_config("R50x1.5", 5) == ResNetConfig(units=(3, 4, 6, 3), width=1.5, num_classes=5)


@pytest.mark.parametrize("name", [*PUBLISHED, "R1-1-1-1x0.5", "R10-1-2-1x2"])
def test_a_name_comes_back_from_its_configuration(name):
    config = model_config(name, 2)
    assert model_name(config.units, config.width) == name


@pytest.mark.parametrize("name", ["R18x1", "R50", "resnet50", "R1-1-1x1", "R50x1 ", "r50x1", "R50x1.", ""])
def test_an_unknown_name_lists_the_known_ones_and_the_free_form(name):
    with pytest.raises(ConfigError) as error:
        create_model(name, 10)
    for known in (*PUBLISHED, "R1-1-1-1x0.5", repr(name)):
        assert known in str(error.value)
    assert "\n" not in str(error.value)


def test_a_near_miss_is_told_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean R101x3"):
        create_model("BiT-M-R101x3", 10)


def test_a_width_that_groups_do_not_divide_names_the_model():
    with pytest.raises(ConfigError, match=r"model: R50x0\.3: width: 0\.3; accepted: a positive multiple of 0\.5"):
        create_model("R50x0.3", 10)
