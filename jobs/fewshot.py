r"""Transfer a model to k examples per class, several draws each, and draw the curve (paper §3.5, Figure 2).

    ray job submit --working-dir . -- python jobs/fewshot.py --name pets-few-shot --init models:/bit-m-r50x1@champion \
        --shards s3://BUCKET/pets/train --test-shards s3://BUCKET/pets/test --storage s3://BUCKET/runs

Trainings run side by side, one per GPU or core; started again with the same name, the study continues.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.studies import fewshot
from bit_ray.studies.config import FewShotConfig

if __name__ == "__main__":
    run_job(fewshot, FewShotConfig)
