r"""Search over any settings of pretrain or finetune.

    ray job submit --working-dir . -- python jobs/sweep.py finetune --name pets-sweep --trials 40 \
        --set shards=s3://BUCKET/pets/train init=models:/bit-m-r50x1@champion \
        --space rule.base-lr=log:1e-4:1e-1 rule.num-steps=500,1000,2000 --storage s3://BUCKET/runs

Trials run side by side, one per GPU or core; started again with the same name, the sweep continues.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.sweeps import sweep
from bit_ray.studies.study_config import SweepConfig

if __name__ == "__main__":
    run_job(sweep, SweepConfig)
