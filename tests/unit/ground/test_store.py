import os
import pickle
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from bit_ray import store
from bit_ray.errors import ConfigError, DataError, StoreError


def test_bytes_and_json_come_back(tmp_path):
    uri = f"{tmp_path}/new/deep dir/100%.bin"
    store.write_bytes(uri, b"\0\1")
    assert store.read_bytes(uri) == b"\0\1"
    assert store.read_bytes(f"file://{uri}") == b"\0\1"
    store.write_json(tmp_path / "x.json", {"a": [1, "é"]})
    assert store.read_json(tmp_path / "x.json") == {"a": [1, "é"]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "x"
    store.write_bytes(target, b"old")
    with pytest.raises(TypeError):
        store.write_bytes(target, "text")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert target.read_bytes() == b"old"


def test_an_upload_is_tried_again_until_the_object_has_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(
        store, "filesystem", lambda uri: (pafs.LocalFileSystem(), str(uri).replace("s3:/", str(tmp_path)))
    )
    copied = []

    def copy_files(source, target, *filesystems, chunk_size):
        copied.append(target)
        if len(copied) == 1:
            raise OSError("HTTP status 503")
        Path(target).write_bytes(Path(source).read_bytes()[: None if len(copied) == 3 else 0])

    monkeypatch.setattr(pafs, "copy_files", copy_files)
    (tmp_path / "local").write_bytes(b"12345")
    store.upload_file(tmp_path / "local", "s3://object")
    assert copied == [str(tmp_path / "object")] * 3
    assert (tmp_path / "object").read_bytes() == b"12345"


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://bucket/a/", ("b", "c"), "s3://bucket/a/b/c"),
        ("s3://bucket", ("b",), "s3://bucket/b"),
        ("s3://bucket/a?endpoint_override=localhost:9000", ("b",), "s3://bucket/a/b?endpoint_override=localhost:9000"),
        ("data", ("b",), "data/b"),
        ("/", ("b",), "/b"),
        ("what?", ("b",), "what?/b"),
    ],
)
def test_join(base, parts, joined):
    assert store.join(base, *parts) == joined


def test_exists_and_file_sizes(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "empty").write_bytes(b"")
    assert store.exists(tmp_path)
    assert store.exists(tmp_path / "a")
    assert not store.exists(tmp_path / "b")
    assert store.file_sizes([f"{tmp_path}/{n}" for n in ("a", "empty", "b", "")]) == [3, 0, None, None]


def test_the_directories_directly_below_are_listed_without_those_inside(tmp_path):
    for name in ("b/inner/deep", "a", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b" / "inner" / "file").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"12")
    assert store.list_tree(tmp_path, recursive=False) == ([("file", 2)], ["a", "b", "c"])
    assert store.list_tree(tmp_path)[1] == ["a", "b", "b/inner", "b/inner/deep", "c"]
    assert store.list_tree(tmp_path / "none", recursive=False) == ([], [])


def test_download_directory_copies_all_or_nothing(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("a", "sub/b", "sub/sub/c d"):
        store.write_bytes(source / name, name.encode())
    target.mkdir()
    store.download_directory(source, target)
    assert store.list_files(target) == ["a", "sub/b", "sub/sub/c d"]
    assert (target / "sub/sub/c d").read_bytes() == b"sub/sub/c d"
    with pytest.raises(DataError, match=f"{target}: not empty"):
        store.download_directory(source, target)
    with pytest.raises(DataError, match="no such directory"):
        store.download_directory(tmp_path / "none", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/x", "scheme http://; accepted: a local path, file://, s3:// or gs://"),
        ("s3://", "no bucket; accepted: s3://bucket/path"),
        ("gs:///", "no bucket"),
    ],
)
def test_a_uri_that_cannot_work_is_named(uri, message):
    with pytest.raises(DataError) as caught:
        store.filesystem(uri)
    assert str(caught.value).startswith(f"{uri}: {message}")


@pytest.mark.parametrize(
    ("uri", "given"),
    [
        ("s3://AK:PLANTED@bucket/x", "s3://***@bucket/x"),
        ("s3://AK:PLAN/TED@bucket/x", "s3://***@bucket/x"),
        ("s3://AK:PLANTED/bucket", "s3://***"),
        ("s3://PLANTED@bucket", "s3://***@bucket"),
        ("S3://AK: PLANTED@bucket", "s3://***@bucket"),
        ("gs://me:PLANTED@bucket/x", "gs://***@bucket/x"),
        ("s3://bucket/x?endpoint_override=me:PLANTED@host&scheme=http", "s3://***@host&scheme=http"),
        ("http://me:PLANTED@host/x", "http://***@host/x"),
    ],
)
def test_a_uri_with_a_key_is_refused_before_anybody_is_asked_and_not_shown(uri, given):
    for refused in (store.filesystem, store.absolute, store.read_bytes, store.exists, store.check_uri):
        with pytest.raises(DataError) as caught:
            refused(uri)
        assert str(caught.value).startswith(f"{given}: ")
        assert "PLAN" not in str(caught.value)
        assert "TED" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_keys_of_objects_may_hold_any_sign(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    query = "?endpoint_override=127.0.0.1:9&scheme=http"
    for key in ("sets@v2/a", "a:b@c", "a#b", "50%"):
        assert store.filesystem(f"s3://bucket/{key}{query}")[1] == f"bucket/{key}"
    assert store.filesystem("gs://anonymous@public-bucket/a@b")[1] == "public-bucket/a@b"


@pytest.mark.parametrize(
    "endpoint", ["http://me:PLANTED@127.0.0.1:9", "http://me:PLAN/TED@127.0.0.1:9", "me:PLANTED@h"]
)
def test_an_endpoint_with_a_password_is_refused_and_not_shown(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(DataError, match=r"^AWS_ENDPOINT_URL: \*\*\*@.*: a user in it; accepted: http") as caught:
        store.read_bytes("s3://bucket/x")
    assert "TED" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_secret_in_a_query_is_not_shown():
    with pytest.raises(DataError) as caught:
        store.read_bytes("s3://bucket/x?secret_key=PLANTED&X-Amz-Signature=PLANTED")
    assert "PLANTED" not in str(caught.value)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(monkeypatch):
    texts = iter([b'{"a": [1, 2', b'{"a": [1, 2, 3]}'])
    monkeypatch.setattr(store, "read_bytes", lambda uri, max_bytes: next(texts))
    assert store.read_json("s3://b/x.json") == {"a": [1, 2, 3]}


def test_missing_and_forbidden_files_are_one_line(tmp_path):
    with pytest.raises(DataError, match="none: no such file, directory or bucket; check the path$"):
        store.read_bytes(tmp_path / "none")
    store.write_bytes(tmp_path / "half.json", b'{"a": 1, "b": [')
    with pytest.raises(DataError, match=r"half.json: not valid JSON \(.*\), perhaps truncated") as caught:
        store.read_json(tmp_path / "half.json")
    assert "\n" not in str(caught.value)


def test_s3_asks_for_no_trailing_checksums_unless_told(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    assert store.filesystem("s3://bucket/a b/100%?endpoint_override=127.0.0.1:9&scheme=http")[1] == "bucket/a b/100%"
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
    assert os.environ["AWS_RESPONSE_CHECKSUM_VALIDATION"] == "when_supported"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "{home}/.cache/bit_ray"),
        ("", "{home}/.cache/bit_ray"),
        ("~/kept", "{home}/kept"),
        ("~", "{home}"),
        ("here/below", "{cwd}/here/below"),
        ("/kept", "/kept"),
    ],
)
def test_the_cache_folder_is_absolute_whatever_names_it(tmp_path, monkeypatch, given, expected):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("BIT_RAY_CACHE", raising=False)
    if given is not None:
        monkeypatch.setenv("BIT_RAY_CACHE", given)
    assert store.cache_folder() == Path(expected.format(home=home, cwd=cwd))


def test_a_cache_folder_in_a_home_that_nobody_has_is_refused(monkeypatch):
    monkeypatch.setenv("BIT_RAY_CACHE", "~nobody-of-that-name/kept")
    with pytest.raises(ConfigError, match="^BIT_RAY_CACHE: ~nobody-of-that-name/kept: no such home folder; accepted: "):
        store.cache_folder()


@pytest.mark.parametrize(
    ("uri", "failure", "passing"),
    [
        ("s3://b/x", OSError("AWS Error NETWORK_CONNECTION"), True),
        ("s3://b/x", OSError("HTTP status 503"), True),
        ("s3://b/x", OSError("HTTP status 403"), False),
        ("s3://b/x", OSError("AWS Error NO_SUCH_BUCKET"), False),
        ("s3://b/x", FileNotFoundError("x"), False),
        ("/disk/x", OSError(28, "No space left on device"), False),
    ],
)
def test_a_failure_says_whether_it_may_pass_also_to_another_process(uri, failure, passing):
    with pytest.raises(StoreError) as caught, store.explained(uri):
        raise failure
    assert pickle.loads(pickle.dumps(caught.value)).passing == passing
