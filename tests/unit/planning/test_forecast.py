import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bit_ray.config import from_dict
from bit_ray.errors import ConfigError
from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.planning.costs import GPUS, NETWORKS, seconds_per_image
from bit_ray.planning.forecast import Forecast, forecast
from bit_ray.planning.inputs import inputs_of
from bit_ray.planning.ranges import Range

# timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv: network, side of the image, images/s in training.
TIMM = [
    ("R50x1", 224, 585.83),
    ("R50x1", 448, 147.75),
    ("R101x1", 448, 84.72),
    ("R152x2", 224, 89.16),
    ("R152x2", 384, 31.17),
    ("R152x2", 448, 22.58),
    ("R50x3", 448, 34.68),
    ("R101x3", 448, 18.05),
]


def plan(**settings: object) -> Forecast:
    data = {"gpus": 64, "gpu": "h100", **settings}
    config = from_dict(ClusterPlanConfig, data)
    return forecast(config, inputs_of(config))


@pytest.mark.parametrize(("model", "size", "images_per_s"), TIMM)
def test_a_gpu_trains_as_fast_as_others_have_measured(model: str, size: int, images_per_s: float) -> None:
    found = seconds_per_image(NETWORKS[model].at(size), GPUS["rtx3090"], 1000)
    assert 1 / found.likely == pytest.approx(images_per_s, rel=0.11)
    assert 1 / found.high < images_per_s < 1 / found.low


@pytest.mark.parametrize(
    ("model", "tflops", "tb_per_s", "images", "chip_seconds"),
    [
        # 90 epochs of ImageNet in 32 minutes on 128 cores, two a chip (big_vision:configs/bit_i1k.py).
        ("R50x1", 123, 0.9, 90 * 1_281_167, 32 * 60 * 64),
        # 40 epochs of JFT in 9,900 core-days (arXiv 2010.11929, Table 2).
        ("R152x4", 123, 0.9, 40 * 300e6, 9_900 * 86_400 / 2),
    ],
)
def test_what_the_authors_took_on_tpus_is_inside_the_interval(
    model: str, tflops: float, tb_per_s: float, images: float, chip_seconds: float
) -> None:
    chip = replace(GPUS["h100"], tflops=tflops, memory_tb_per_s=tb_per_s)
    found = seconds_per_image(NETWORKS[model], chip, 1000)
    assert found.low <= chip_seconds / images <= 1.02 * found.high


def test_a_plan_worked_by_hand() -> None:
    # A node of one worker that trains 1 image in 10 ms; one core decodes one in 2 ms; nothing fails.
    config = ClusterPlanConfig(
        gpus=1, gpu="h100", num_images=10_000, epochs=4, global_batch_size=100, model="R50x1", price=3.6
    )
    known = replace(
        inputs_of(config), step_s=Range.exactly(0.01), view_s=Range.exactly(0.002), image_bytes=Range.exactly(100e3)
    )
    free = replace(known, mtbf_h=Range.exactly(math.inf))
    found = forecast(config, replace(free, node=replace(free.node, cores=1, cache_gb=0.5)))
    assert found.bound_by == "computing"
    assert found.num_steps == 400
    assert found.train_s == pytest.approx(Range.exactly(400.0))
    assert found.gradients_s == Range.exactly(0.0)  # of one node
    assert found.failures == Range.exactly(0.0)
    assert found.device_h.likely == pytest.approx((120 + 400) / 3600, rel=0.01)  # with a start
    assert found.money["devices"].likely == pytest.approx(0.52, rel=0.01)
    assert found.cores_per_device.likely == pytest.approx(0.2)
    assert found.read_bytes_per_s.likely == pytest.approx(100 * 100e3)
    # Of the set's 1 GB, 0.5 are on the node: it is read whole once, and half of it three times.
    assert found.cache_share == pytest.approx(0.5)
    assert found.fetched_bytes.likely == pytest.approx(2.5e9)
    # 157 row groups of 64 images; one request each, or three.
    assert found.requests.likely / 3 == pytest.approx(157 * 2.5)
    # R50x1 with 18,291 classes: weights and momentum in float32.
    assert found.checkpoint_bytes == 8 * (23_500_352 + 2049 * 18_291)
    slow = forecast(config, replace(free, view_s=Range.exactly(0.02), node=replace(free.node, cores=1)))
    assert (slow.bound_by, slow.images_per_s.likely) == ("decoding", pytest.approx(50))
    thin = forecast(config, replace(free, node=replace(free.node, cache_gb=0.0, storage_gbits=0.008)))
    assert (thin.bound_by, thin.images_per_s.likely) == ("reading", pytest.approx(10))


def test_gradients_between_nodes_are_worked_by_hand() -> None:
    found = plan(gpus=16, model="R152x4", node={"network_gbits": 100.0})
    # Nearly twice 1.078e9 parameters of 4 bytes through 70 % of 12.5 GB/s: of two nodes, once.
    assert found.gradients_s.likely == pytest.approx(1.0782e9 * 4 / (0.7 * 12.5e9), rel=1e-3)
    assert plan(gpus=256, model="R152x4", node={"network_gbits": 10.0}).bound_by == "gradients"


SETTINGS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(sorted(NETWORKS)),
        "gpu": st.sampled_from(sorted(GPUS)),
        "gpus": st.sampled_from([1, 8, 64, 256]),
        "num_images": st.sampled_from([1e5, 1e7, 3e8]),
        "epochs": st.sampled_from([1.0, 40.0]),
        "price": st.sampled_from([1.0, 30.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(SETTINGS)
def test_every_interval_is_one_and_more_costs_more(given_: dict[str, object]) -> None:
    found = plan(**given_)
    for name, value in vars(found).items():
        if isinstance(value, Range):
            assert value.low <= value.likely <= value.high, name
    more_images = plan(**{**given_, "num_images": given_["num_images"] * 2})
    assert more_images.total_s.likely > found.total_s.likely
    assert more_images.money["devices"].likely > found.money["devices"].likely
    assert more_images.fetched_bytes.likely > found.fetched_bytes.likely
    assert abs(more_images.num_steps - 2 * found.num_steps) <= 1
    many = plan(**{**given_, "failures": {"mtbf_hours": 300.0}})
    few = plan(**{**given_, "failures": {"mtbf_hours": 30_000.0}})
    assert few.total_s.likely < many.total_s.likely
    spot = plan(**{**given_, "failures": {"mtbf_hours": 30_000.0, "preemptions_per_day": 1.0}})
    assert few.total_s.likely < spot.total_s.likely
    cores = plan(**{**given_, "node": {"cores": 1000}})
    assert cores.total_s.likely <= found.total_s.likely
    assert plan(**{**given_, "seekable": True}).cores_per_device.likely <= found.cores_per_device.likely * 1.3


def test_a_plan_takes_what_is_not_given_from_the_recipe() -> None:
    found = plan(recipe="bit_m").inputs
    assert (found.num_images, found.num_classes, found.epochs, found.batch_size) == (14_200_000, 21_843, 90, 4096)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"gpu": ""}, "gpu"),
        ({"gpu": "tpu"}, "gpu"),
        ({"gpus": 0}, "gpus"),
        ({"gpus": 5000}, "gpus"),
        ({"price": -1.0}, "price"),
        ({"num_images": 1.5}, "num_images"),
        ({"num_images": 10.0, "epochs": 1.0}, "num_images"),
        ({"crop_size": 8}, "crop_size"),
        ({"model": "R51x1"}, "model"),
        ({"calibrate": True}, "calibrate"),
        ({"node": {"cores": -1}}, "node.cores"),
        ({"failures": {"checkpoint_every_s": 0.0}}, "failures.checkpoint_every_s"),
        ({"prices": {"storage": -0.1}}, "prices.storage"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_field(data: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(**data)
    assert caught.value.field == field
