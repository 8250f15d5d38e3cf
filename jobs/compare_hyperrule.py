r"""Compare BiT-HyperRule with a sweep of the paper's space, task by task: accuracy, regret and costs (paper App. A).

    ray job submit --working-dir . -- python jobs/compare_hyperrule.py --name pets-rule-or-sweep \
        --init models:/bit-m-r50x1@champion --tasks s3://BUCKET/pets/train,s3://BUCKET/pets/test \
        --price 2.5 --storage s3://BUCKET/runs

Trainings run side by side, one per GPU or core; started again with the same name, the study continues.
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.sweeps import study_compare
from bit_ray.studies.study_config import CompareConfig

if __name__ == "__main__":
    run_job(study_compare, CompareConfig)
