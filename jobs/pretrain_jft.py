"""Pre-train BiT-L as on JFT-300M: 40 epochs, batch 4096, R152x4 (paper §3.3), on any shard set and any cluster.

    ray job submit --working-dir . -- python jobs/pretrain_jft.py --name bit-l-r152x4 --shards s3://BUCKET/jft \
        --storage s3://BUCKET/runs --tracking.uri http://MLFLOW:5000

It trains on all GPUs of the cluster and continues when it is submitted again. The same job on one machine:

    bit-ray shards write glyphs:s bit_ray_runs/shards/glyphs-s
    python jobs/pretrain_jft.py --name small --shards bit_ray_runs/shards/glyphs-s --model R1-1-1-1x0.5 \
        --recipe.epochs 4 --recipe.decay-epochs 2 3 --recipe.global-batch-size 128 --recipe.warmup-steps 10 \
        --recipe.crop-size 32

``--dry-run`` prints the resolved plan and stops; ``--help`` lists all settings.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.training import pretrain
from bit_ray.data.stream.settings import Shuffle
from bit_ray.recipes.upstream import bit_l
from bit_ray.training.config import PretrainConfig

if __name__ == "__main__":
    # Up to 512 workers then read nothing twice; fewer hold more windows each (64 workers: 8 windows of 512 images).
    run_job(pretrain, PretrainConfig, model="R152x4", recipe=bit_l(), shuffle=Shuffle(num_lanes=512))
