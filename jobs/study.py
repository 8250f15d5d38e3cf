r"""Run a study of what the paper found: weight-decay, schedule, normalisers, size-data or recipe.

    ray job submit --working-dir . -- python jobs/study.py weight-decay --name weight-decay-r50x1 --seeds 3 \
        --set shards=s3://BUCKET/imagenet/train model=R50x1 recipe.epochs=90 recipe.decay-epochs=[30,60,80] \
        --axes recipe.weight-decay=1e-4,1e-5 --val-shards s3://BUCKET/imagenet/val \
        --where cluster --storage s3://BUCKET/runs

Started again with the same name, the study continues.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.sweeps import study_run
from bit_ray.studies.study_config import GridConfig

if __name__ == "__main__":
    run_job(study_run, GridConfig)
