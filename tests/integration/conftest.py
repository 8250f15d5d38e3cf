"""Fixtures of the integration tests: a real S3 server, a real MLflow server and a local Ray, all on loopback."""

import os
import uuid
from collections.abc import Iterator

import pytest
from faulty_s3 import Faults, FaultyGoogle, FaultyS3
from gs_server import GoogleBucket, GoogleServer
from s3_server import Bucket, S3Server
from servers import mlflow_server  # noqa: F401  # a fixture

from bit_ray import claim


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3") / "store")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A fresh, empty bucket, with the AWS variables of this process pointing at it for the length of the test."""
    bucket = Bucket(s3_server.endpoint, f"test-{uuid.uuid4().hex[:16]}", s3_server.client(), s3_server)
    bucket.client.create_bucket(Bucket=bucket.bucket)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):  # would win over what is set here
        monkeypatch.delenv(name, raising=False)
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(claim, "SETTLE_S", 0.1)  # nothing starts twice at the same moment, but where a test says so
    yield bucket
    bucket.delete()


@pytest.fixture
def faulty_s3(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A proxy before the server, at first without faults; the AWS variables of this process point at it."""
    proxy = FaultyS3(s3.endpoint)
    proxy.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def google_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServer]:
    server = GoogleServer(tmp_path_factory.mktemp("gs"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def gs(google_server: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> GoogleBucket:
    """A fresh, empty bucket in an emulator of Google's store; the variables of this process point at it."""
    bucket = GoogleBucket(f"test-{uuid.uuid4().hex[:16]}", google_server)
    google_server.request("POST", "b?project=tests", {"name": bucket.bucket})
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(claim, "SETTLE_S", 0.1)
    return bucket


@pytest.fixture(scope="session")
def google_proxy(google_server: GoogleServer) -> Iterator[FaultyGoogle]:
    """The same proxy before the emulator, at first without faults."""
    proxy = FaultyGoogle(google_server.endpoint)
    proxy.start()
    yield proxy
    proxy.stop()


@pytest.fixture
def faulty_gs(gs: GoogleBucket, google_proxy: FaultyGoogle, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyGoogle]:
    """That proxy, to which the variables of this process point."""
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", google_proxy.endpoint)
    yield google_proxy
    google_proxy.fail(Faults())


@pytest.fixture(scope="session")
def ray_local(s3_server: S3Server, google_server: GoogleServer, google_proxy: FaultyGoogle) -> Iterator[None]:
    """One Ray of this process, 6 CPUs by name, for all tests that ask for it; its workers reach both stores.

    They reach Google's by the proxy: this variable wins over an endpoint in a URI.
    """
    import ray

    from bit_ray.cluster.session import without_observers

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # as in a cluster that a command starts
    with pytest.MonkeyPatch.context() as environment, without_observers():
        for name, value in (s3_server.environment | google_server.environment).items():
            environment.setenv(name, value)
        environment.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", google_proxy.endpoint)
        ray.init(
            address="local",
            num_cpus=6,
            num_gpus=0,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
            # Not 127.0.0.1, for which Ray would take the machine's outer address.
            _node_ip_address="127.0.0.2",
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_started_here(ray_local: None) -> Iterator[None]:
    """That Ray, taken for one that a command has started: as many processes as cores, not as its CPUs by name."""
    from bit_ray.cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_started_here", True)
        yield
