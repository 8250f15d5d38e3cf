"""Runs against a real MLflow server that is killed and comes back."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import MlflowServer

from bit_ray import store
from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import Manifest
from bit_ray.errors import TrackingError
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import RunRecord
from bit_ray.tracking.config import TrackingConfig
from bit_ray.tracking.runs import TrackedRun
from bit_ray.training.config import FinetuneConfig
from bit_ray.training.driver import TrainResult, train
from bit_ray.training.plan import transfer_plan

pytestmark = pytest.mark.cluster


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that the test may kill."""
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


def open_run(server: MlflowServer, storage: Path, name: str) -> TrackedRun:
    config = TrackingConfig(uri=server.uri, experiment="outages")
    params = {"lr": 0.1}
    return TrackedRun.open(config, run_name=name, storage=str(storage), params=params, tags={}, kind="pretrain")


def history(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=run.tracking_uri)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.run_id, name)]


def finished(storage: Path, server: MlflowServer, run: TrackedRun) -> Callable[[], TrainResult]:
    """Leave the records of a finished training, and return what starts it again."""
    rule = hyperrule(8, (32, 32))
    plan = transfer_plan(
        rule, model="R50x1", num_classes=2, manifest_digest="0", init="", init_digest="", seed=0
    )  # fmt: skip
    folder = RunFolder.of(str(storage), "over")
    store.write_json(folder.plan, to_dict(RunRecord(digest=plan.digest, shards="s", plan=to_dict(plan))))
    result = TrainResult(package_uri="p", sha256="0" * 64, run_id=run.run_id, plan_digest=plan.digest, metrics={})
    store.write_json(folder.result, to_dict(result))
    tracking = TrackingConfig(uri=server.uri, experiment="outages")
    config = FinetuneConfig(name="over", shards="s", model="R50x1", storage=str(storage), tracking=tracking)
    manifest = Manifest(
        name="s",
        class_names=("a", "b"),
        multi_label=False,
        row_group_size=8,
        median_image_size=(32, 32),
        num_examples=8,
        shards=(),
    )
    return lambda: train(config, plan, "s", manifest)


def test_an_outage_of_the_server_loses_and_doubles_nothing(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One run goes on all the while, and what three others could not send by their end is sent when they start again,
    also by a training that is finished, which is not done again.
    """
    # MLflow's own retries of a request that was on its way could outlive the outage, which then nobody would notice.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    storage = tmp_path / "runs"
    run, later, continued, over = (open_run(server, storage, name) for name in ("outage", "later", "continued", "over"))
    longest = 0.0

    def log(steps: range) -> None:
        nonlocal longest
        for step in steps:
            begin = time.monotonic()
            run.log_metrics({"loss": 1.0 / (step + 1), "nan": math.nan}, step=step)
            longest = max(longest, time.monotonic() - begin)
            time.sleep(0.01)

    log(range(0, 200))  # some of these are on their way when the server dies
    server.kill()
    log(range(200, 400))
    run.log_text("drawn while the server was gone", "plots/note.txt")
    run.set_tags({"bit_ray.best_step": "250"})
    begin = time.monotonic()
    for ended in (later, continued):
        ended.log_metrics({"loss": 3.0}, step=1)
        assert ended.close("FAILED", timeout_s=2) >= 2  # the metric and the end of the run
    over.log_metrics({"loss": 5.0}, step=1)
    assert over.close(timeout_s=0.5) >= 2
    assert time.monotonic() - begin < 8
    again_over = finished(storage, server, over)
    with pytest.raises(TrackingError, match=r"cannot be reached \(connection refused\)"):
        again_over()
    with pytest.raises(TrackingError, match=r"cannot be reached \(connection refused\)"):
        open_run(server, storage, "new")
    server.start()
    log(range(400, 500))
    assert run.close(timeout_s=60) == 0

    assert history(run, "loss") == [(step, 1.0 / (step + 1)) for step in range(500)]
    values = history(run, "nan")
    assert [step for step, _ in values] == list(range(500))
    assert all(math.isnan(value) for _, value in values)
    client = MlflowClient(tracking_uri=server.uri)
    recorded = client.get_run(run.run_id)
    assert recorded.info.status == "FINISHED"
    assert recorded.data.tags["bit_ray.best_step"] == "250"
    assert [path.read_text() for path in server.artifacts.rglob("note.txt")] == ["drawn while the server was gone"]
    assert longest < 0.25  # seconds; a request to a dead server takes MLflow minutes
    kept = f"training continues, metrics are kept in {storage / 'spool' / run.run_id} and sent later"
    assert caplog.text.count(kept) == 1
    assert caplog.text.count("can be used again") == 1
    assert not (storage / "spool" / run.run_id).exists()

    assert open_run(server, storage, "later").close("FAILED", timeout_s=60) == 0
    assert client.get_run(later.run_id).info.status == "FAILED"
    assert history(later, "loss") == [(1, 3.0)]

    again = open_run(server, storage, "continued")
    assert again.run_id == continued.run_id
    again.log_metrics({"loss": 4.0}, step=1)  # queued before, so not again
    again.log_metrics({"loss": 2.0}, step=2)
    assert again.close(timeout_s=60) == 0
    assert history(again, "loss") == [(1, 3.0), (2, 2.0)]
    assert client.get_run(again.run_id).info.status == "FINISHED"
    assert again_over().run_id == over.run_id
    assert history(over, "loss") == [(1, 5.0)]
    assert client.get_run(over.run_id).info.status == "FINISHED"
    assert not any((storage / "spool").iterdir())
