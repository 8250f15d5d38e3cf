"""From the queue on disk to MLflow: the order, the size of a request, and what to do with failed operations."""

import logging
from collections.abc import Iterator
from pathlib import Path

from bit_ray.errors import one_line
from bit_ray.tracking.server import probe
from bit_ray.tracking.spool import Operation, Spool, read_segment

# isort: split
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

METRICS_PER_BATCH = 500  # MLflow allows 1000 metrics, 100 tags and 1 MB in one request
TAGS_PER_BATCH = 50


def send(client: MlflowClient, run_id: str, spool: Spool) -> str:
    """Send the queued operations, oldest first; return why not all were sent, or an empty text.

    A value that was sent already is not recorded twice: MLflow's stores identify a metric by its name, step, time and
    value. An artifact that cannot be stored goes to the end of the queue, so that it never blocks metrics.
    """
    failure = ""
    if not spool.segments():
        return failure
    try:
        probe(client.tracking_uri)
        for segment in spool.seal():
            for batch in _batches(read_segment(segment)):
                try:
                    _send_batch(client, run_id, spool, batch)
                except Exception as error:
                    if _is_refusal(error):
                        log.warning("MLflow refuses %d entries of run %s: %s", len(batch), run_id, one_line(error))
                        spool.refuse(batch, one_line(error))
                    elif "artifact" in batch[0]:
                        failure = f"{Path(batch[0]['artifact']).name} cannot be stored ({one_line(error)})"
                        spool.append(batch[0])
                    else:
                        raise
            segment.unlink(missing_ok=True)
    except Exception as error:
        return one_line(error)
    return failure


def _send_batch(client: MlflowClient, run_id: str, spool: Spool, batch: list[Operation]) -> None:
    first = batch[0]
    if "artifact" in first:
        path = spool.directory / first["artifact"]
        if path.is_dir():
            client.log_artifacts(run_id, str(path), "/".join(filter(None, (first["folder"], path.name))))
        elif path.exists():
            client.log_artifact(run_id, str(path), first["folder"] or None)
        spool.drop_file(first["artifact"])
    elif "child" in first:
        _send_child(client, run_id, first)
    elif first.get("status") == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    elif "status" in first:
        client.set_terminated(run_id, first["status"], end_time=first["time"])
    else:
        metrics = [
            Metric(name, value, operation["time"], operation["step"])
            for operation in batch
            for name, value in operation.get("metrics", {}).items()
        ]
        tags = {name: value for operation in batch for name, value in operation.get("tags", {}).items()}
        client.log_batch(run_id, metrics=metrics, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)


def _send_child(client: MlflowClient, run_id: str, child: Operation) -> None:
    experiment, name, now = client.get_run(run_id).info.experiment_id, child["child"], child["time"]
    tags = {"mlflow.parentRunId": run_id, "bit_ray.run_name": name, "bit_ray.kind": "trial"}
    query = " and ".join(f'tags.`{key}` = "{value}"' for key, value in tags.items())
    found = client.search_runs([experiment], query, max_results=1)
    run = found[0] if found else client.create_run(experiment, start_time=now, tags=tags, run_name=name)
    params = [Param(key, value) for key, value in child["params"].items()]
    metrics = [Metric(key, value, now, 0) for key, value in child["values"].items()]
    client.log_batch(run.info.run_id, metrics=metrics, params=params, synchronous=True)
    client.set_terminated(run.info.run_id, end_time=now)


def _batches(operations: list[Operation]) -> Iterator[list[Operation]]:
    """Yield metrics and tags in lists that fit one request, and every other operation by itself."""
    batch: list[Operation] = []
    num_metrics = num_tags = 0
    for operation in operations:
        more_metrics, more_tags = len(operation.get("metrics", ())), len(operation.get("tags", ()))
        alone = not (more_metrics or more_tags)
        if batch and (alone or num_metrics + more_metrics > METRICS_PER_BATCH or num_tags + more_tags > TAGS_PER_BATCH):
            yield batch
            batch, num_metrics, num_tags = [], 0, 0
        if alone:
            yield [operation]
        else:
            batch.append(operation)
            num_metrics, num_tags = num_metrics + more_metrics, num_tags + more_tags
    if batch:
        yield batch


def _is_refusal(error: Exception) -> bool:
    """Return whether MLflow itself says that it will never accept this, such as for a deleted run."""
    return isinstance(error, MlflowException) and error.error_code in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
        "BAD_REQUEST",
    )
