"""Small runs on glyphs, for the tests of training."""

import torch
from mlflow import MlflowClient

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.data.stream.batches import StreamSpec, batches
from bit_ray.inference.classifier import load_model
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.training.device import worker_threads
from bit_ray.training.healing import Healer
from bit_ray.training.learner import Learner

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


def trained_here(plan, shards, *, init_weights=None, left_out=()):
    """What a plan gives without workers, checkpoints and records: the loss after each step, and the weights.

    Only the data is read by `ray_local`. It is the same, bit for bit, as a run on one worker.
    """
    healer = Healer(0, left_out) if left_out else None
    learner = Learner(plan, torch.device("cpu"), init_weights=init_weights, healer=healer)
    spec = StreamSpec(
        shards=str(shards),
        manifest_digest=plan.manifest_digest,
        global_batch_size=plan.global_batch_size,
        slots=learner.slots,
        start_step=0,
        stop_step=plan.schedule.num_steps,
        seed=plan.seed,
        shuffle=plan.shuffle,
        view=plan.view,
    )
    losses, without = {}, {entry.step for entry in left_out}
    with worker_threads("cpu"):
        for batch in batches(spec):
            loss, _ = learner.step(batch.step, batch.images, learner.targets(batch.rows))
            if batch.step not in without:
                losses[batch.step + 1] = loss.item()
        learner.check()
    return losses, learner.model.state_dict()
