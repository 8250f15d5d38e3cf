"""Pre-train with any recipe: BiT-S on ILSVRC-2012, BiT-M on ImageNet-21k (the default), or your own.

    ray job submit --working-dir . -- python jobs/pretrain.py --recipe bit_s --name bit-s-r50x1 --shards s3://BUCKET/ilsvrc

``--recipe.epochs 30 --recipe.decay-epochs 10 20`` changes the recipe, ``--config FILE`` repeats an earlier run, and
``--dry-run`` prints the resolved plan and stops.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.training import pretrain
from bit_ray.training.config import PretrainConfig

if __name__ == "__main__":
    run_job(pretrain, PretrainConfig)
