"""What holds for every test: nothing of the user's shell reaches it, and nothing of it reaches the outside."""

import os

# Small tensors and two cores: one thread is faster, and the same numbers come out everywhere. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "AWS_ENDPOINT_URL"):
    os.environ.pop(name, None)
