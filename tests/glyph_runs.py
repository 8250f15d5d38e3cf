"""Small runs on glyphs, for the tests of training."""

import torch
from mlflow import MlflowClient

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.inference.classifier import load_model
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.training.config import PretrainConfig, Runtime

MODEL = "R1-1-1-1x0.5"

# What a user's own script does; Ray is started by the program.
SCRIPT = """
import sys
from bit_ray.config_files import read_config
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain

if __name__ == "__main__":
    print(pretrain(read_config(PretrainConfig, sys.argv[1])))
"""


def recipe(num_steps, batch=64, examples=400, **changes):
    settings = {
        "name": "small",
        "epochs": num_steps * batch / examples,
        "decay_epochs": (),
        "global_batch_size": batch,
        "base_lr_per_256": 0.4,
        "warmup_steps": 0,
        "crop_size": 32,
    }
    return UpstreamRecipe(**settings | changes)


def run_config(folder, name, shards, num_steps, *, base_lr_per_256=0.4, **runtime):
    return PretrainConfig(
        name=name,
        shards=str(shards),
        model=MODEL,
        storage=str(folder),
        recipe=recipe(num_steps, base_lr_per_256=base_lr_per_256),
        runtime=Runtime(**{"num_workers": 1, "log_every_steps": 1, **runtime}),
    )


def write_glyphs(uri):
    """400 glyphs of 50 classes."""
    write_shards(GlyphSource("s", examples_per_class=8), uri, name="glyphs", row_group_size=16, shard_examples=128)
    return uri


def history(folder, run_id, metric="train/loss"):
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    return [(m.step, m.value) for m in sorted(client.get_metric_history(run_id, metric), key=lambda m: m.step)]


def weights(uri):
    return load_model(uri).model.state_dict()


def assert_identical(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
