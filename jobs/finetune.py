"""Transfer a pre-trained network to a shard set by BiT-HyperRule, evaluate it and register it.

    ray job submit --working-dir . -- python jobs/finetune.py --name pets --init models:/bit-m-r50x1@champion \
        --shards s3://BUCKET/pets/train --test-shards s3://BUCKET/pets/test

``--init`` also takes an official ``.npz``; ``--shots 10`` trains on ten examples per class.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.training import finetune
from bit_ray.training.config import FinetuneConfig

if __name__ == "__main__":
    run_job(finetune, FinetuneConfig)
