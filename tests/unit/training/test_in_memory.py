import numpy as np
import pytest
import torch

from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.views import TrainView
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.training.in_memory import Examples, fit
from bit_ray.training.plan import transfer_plan

MODEL = "R1-1-1-1x0.5"


@pytest.fixture(scope="module")
def glyphs():
    source = GlyphSource("s", examples_per_class=4)
    examples = list(source.part(np.arange(24)))
    return Examples(
        tuple(e.id for e in examples),
        [decode_image(e.image) for e in examples],
        np.array([e.labels[0] for e in examples]),
    )


def plan_for(examples, **changes):
    rule = hyperrule(
        len(examples.ids),
        (32, 32),
        random_flip=False,
        **{"resize": 36, "crop": 32, "num_steps": 12, "batch_size": 16, "base_lr": 0.03, **changes},
    )
    return transfer_plan(rule, model=MODEL, num_classes=6, manifest_digest="0", init="", init_digest="", seed=0)


def trained(examples, plan, micro_batch_size=0):
    losses = []
    model = fit(plan, examples, micro_batch_size=micro_batch_size, on_step=lambda step, loss: losses.append(loss))
    return model, losses


def test_a_few_steps_learn_a_few_classes(glyphs):
    model, losses = trained(glyphs, plan_for(glyphs, num_steps=25))
    assert len(losses) == 25
    assert losses[0] == pytest.approx(np.log(6), abs=1e-5)  # a zero head knows nothing
    assert losses[-1] < 0.5 * losses[0]
    pixels = torch.from_numpy(np.stack(glyphs.images)).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
    with torch.inference_mode():
        right = (model(pixels).argmax(1).numpy() == glyphs.labels).mean()
    assert right > 0.8


def test_the_same_plan_gives_the_same_weights(glyphs):
    plan = plan_for(glyphs)
    first, second = (trained(glyphs, plan)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_change_only_rounding(glyphs):
    plan = plan_for(glyphs, num_steps=4)
    _, whole = trained(glyphs, plan)
    _, split = trained(glyphs, plan, micro_batch_size=4)
    assert split == pytest.approx(whole, rel=1e-3)


def test_views_of_the_paper_s_exceptions_are_followed(glyphs):
    assert plan_for(glyphs).view == TrainView(crop="resize_crop", resize_size=36, crop_size=32, random_flip=False)
