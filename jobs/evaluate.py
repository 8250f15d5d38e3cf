"""Evaluate a registered or saved model on a whole shard set, over the whole cluster.

ray job submit --working-dir . -- python jobs/evaluate.py --model models:/pets@champion --shards s3://BUCKET/pets/test
"""

from bit_ray.cli.main import run_job
from bit_ray.cli.training import evaluate
from bit_ray.evaluation.config import EvaluateConfig

if __name__ == "__main__":
    run_job(evaluate, EvaluateConfig)
