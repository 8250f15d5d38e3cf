"""The S3 server of the tests behaves as S3 where the other tests rely on it."""

import os

import pyarrow.fs
import pytest
import ray
from botocore.exceptions import ClientError
from s3_server import ACCESS_KEY, READ_ONLY_KEY, SECRET_KEY, Bucket, S3Server

pytestmark = pytest.mark.cluster


def test_bytes_written_by_pyarrow_are_read_back_by_boto3(s3: Bucket) -> None:
    data = os.urandom(3 << 20)
    filesystem, path = pyarrow.fs.FileSystem.from_uri(s3.uri("a-folder/key.bin"))
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    assert s3.client.get_object(Bucket=s3.bucket, Key="a-folder/key.bin")["Body"].read() == data


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_gets_an_empty_bucket(s3: Bucket, time: str) -> None:
    assert s3.keys() == []
    s3.client.put_object(Bucket=s3.bucket, Key=time, Body=b"data")
    assert s3.keys() == [time]


def test_environment_points_at_the_server(s3: Bucket) -> None:
    assert {name: os.environ[name] for name in s3.environment} == s3.environment
    assert s3.endpoint.startswith("http://127.0.0.1:")


def test_wrong_secret_and_missing_bucket_are_refused(s3: Bucket) -> None:
    missing, path = pyarrow.fs.FileSystem.from_uri("s3://no-such-bucket/key")
    with pytest.raises(OSError, match="NO_SUCH_BUCKET"):
        missing.open_output_stream(path).close()
    stranger = pyarrow.fs.S3FileSystem(access_key=ACCESS_KEY, secret_key="wrong", endpoint_override=s3.endpoint)
    with pytest.raises(OSError, match="SIGNATURE_DOES_NOT_MATCH"):
        stranger.get_file_info(pyarrow.fs.FileSelector(s3.bucket))


def test_read_only_key_reads_but_does_not_write(s3: Bucket) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key="key", Body=b"data")
    reader = pyarrow.fs.S3FileSystem(access_key=READ_ONLY_KEY, secret_key=SECRET_KEY, endpoint_override=s3.endpoint)
    with reader.open_input_stream(f"{s3.bucket}/key") as stream:
        assert stream.read() == b"data"
    with pytest.raises(OSError, match="(?i)access.?denied"), reader.open_output_stream(f"{s3.bucket}/other") as stream:
        stream.write(b"data")
    assert s3.keys() == ["key"]


def test_an_existing_object_is_not_overwritten_by_a_conditional_put(s3: Bucket) -> None:
    s3.client.put_object(Bucket=s3.bucket, Key="key", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.client.put_object(Bucket=s3.bucket, Key="key", Body=b"second", IfNoneMatch="*")
    assert s3.client.get_object(Bucket=s3.bucket, Key="key")["Body"].read() == b"first"


def test_acknowledged_data_survive_a_crash_of_the_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = S3Server(tmp_path_factory.mktemp("crash") / "store")
    server.start()
    try:
        server.client().create_bucket(Bucket="kept")
        server.client().put_object(Bucket="kept", Key="key", Body=b"data")
        server.kill()
        with pytest.raises(OSError, match="(?i)connect"):
            pyarrow.fs.S3FileSystem(
                access_key="any", secret_key="any", endpoint_override=server.endpoint, request_timeout=1
            ).get_file_info("kept/key")
        server.start()
        assert server.client().get_object(Bucket="kept", Key="key")["Body"].read() == b"data"
    finally:
        server.stop()


def test_a_ray_task_reaches_the_bucket(s3: Bucket, ray_local: None) -> None:
    @ray.remote(num_cpus=1)
    def write(uri: str) -> None:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(uri)
        with filesystem.open_output_stream(path) as stream:
            stream.write(b"data")

    assert ray.cluster_resources()["CPU"] == 6
    ray.get(write.remote(s3.uri("key")))
    assert s3.keys() == ["key"]
