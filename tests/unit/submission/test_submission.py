import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from bit_ray.cli.main import main
from bit_ray.errors import ConfigError
from bit_ray.submission import stage
from bit_ray.submission.config import SubmitConfig
from bit_ray.submission.stage import staged
from bit_ray.tracking import identity
from bit_ray.tracking.identity import check_code, code_digest
from bit_ray.training.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
JOB = str(ROOT / "jobs" / "pretrain_jft.py")
PLACES = ["--shards", "s3://bucket/set", "--storage", "s3://bucket/runs", "--name", "a"]


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


def uris(settings: list[str], *, extension: bool = True) -> tuple[list[str], set[str], str]:
    """The names of the uploads, the files of the package and the command."""
    with staged(JOB, settings, extension=extension) as upload:
        folders = [str(upload.working_dir), str(upload.package)]
        files = {path.relative_to(upload.package).as_posix() for path in upload.package.rglob("*") if path.is_file()}
        return [get_uri_for_directory(folder, include_gitignore=True) for folder in folders], files, upload.command


def test_the_same_bytes_are_the_same_upload_with_the_compiled_decoder(extension: object) -> None:
    first, files, command = uris(PLACES)
    assert uris(PLACES)[0] == first
    assert command == f"python jobs/pretrain_jft.py {' '.join(PLACES)}"
    assert {"cli/main.py", "studies/report.html.jinja"} <= files
    assert sum(name.endswith(".so") for name in files) == 1
    assert not any("__pycache__" in name or name.endswith(".c") for name in files)
    without, fewer, _ = uris(PLACES, extension=False)
    assert without[0] == first[0]
    assert without[1] != first[1]
    assert not any(name.endswith(".so") for name in fewer)


def test_a_config_file_goes_along(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("{}")
    with staged("pretrain", ["--config", str(file), "--name", "a b"], extension=True) as upload:
        assert upload.command == "python -m bit_ray.cli.main pretrain --config configs/run.json --name 'a b'"
        assert upload.preflight.startswith("python -m bit_ray.cli.main preflight pretrain -- --config configs/run.json")
        assert [path.name for path in upload.working_dir.rglob("*") if path.is_file()] == ["run.json"]


def test_hidden_files_and_keys_stay_here_and_too_large_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "project" / "job.py"
    (job.parent / "data").mkdir(parents=True)
    for name, text in {"job.py": "", ".env": "SECRET", "server.key": "SECRET", "data/a.csv": "x" * 3000}.items():
        (job.parent / name).write_text(text)
    with staged(str(job), [], extension=True) as upload:
        names = {path.name for path in upload.working_dir.rglob("*") if path.is_file()}
    assert names == {"job.py", "a.csv"}
    monkeypatch.setattr(stage, "MOST_BYTES", 2000)
    with pytest.raises(ConfigError, match=r"job: .*/project has 0.0 MiB, most of it in data \(0.0 MiB\), job.py"):
        staged(str(job), [], extension=True).__enter__()


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as job servers do that cannot be started here."""

    answers: dict[str, tuple[int, str]]
    uploads = 0

    def do_GET(self) -> None:
        status, text = self.answers.get(self.path, (404, "nothing"))
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        type(self).uploads += 1
        self.do_GET()

    do_POST = do_PUT

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[type[Server]]:
    handler = type("Handler", (Server,), {"answers": {}, "uploads": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        handler.address = f"http://127.0.0.1:{web.server_port}"  # type: ignore[attr-defined]
        yield handler
        web.shutdown()


def versions(ray: str, python: str) -> dict[str, tuple[int, str]]:
    return {
        "/api/version": (200, json.dumps({"version": "4", "ray_version": ray, "ray_commit": ""})),
        "/api/v0/cluster_metadata": (200, json.dumps({"data": {"rayVersion": ray, "pythonVersion": python}})),
    }


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"/api/version": (401, "Unauthorized")}, "--address: SERVER wants a token, and "),  # what it got is said
        ({"/api/version": (200, "<html>")}, "--address: SERVER: not the answer of a Ray job server (HTTP 200); acc"),
        (
            {**versions("2.60.0", "3.11.7"), "/api/v0/cluster_metadata": (200, "<html>")},
            "--address: SERVER: not the answer of a Ray job server (HTTP 200); acc",
        ),
        (versions("2.40.0", "3.11.7"), "--address: SERVER runs Ray 2.40.0; accepted: 2.60 or newer; use another im"),
        (versions("2.60.0", "3.9.1"), "--address: SERVER runs Python 3.9.1; accepted: 3.11 or newer; use another i"),
    ],
    ids=["token", "no job server", "half a job server", "Ray", "Python"],
)
def test_a_cluster_that_cannot_run_it_is_refused_before_anything_is_uploaded(
    server: type[Server], answers: dict[str, tuple[int, str]], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers = answers
    address = server.address  # type: ignore[attr-defined]
    assert main(["submit", JOB, "--address", address, "--", *PLACES]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error.replace('SERVER', address)}")
    assert server.uploads == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["jobs/no.py", "--", *PLACES],
            "JOB: jobs/no.py: No such file or directory; accepted: a file that calls run_j",
        ),
        (["pretrian", "--", *PLACES], "JOB: pretrian: no such job; accepted: a file of jobs/, or the name of a comm"),
        ([str(ROOT / "setup.py"), "--", *PLACES], f"JOB: {ROOT}/setup.py: 0 calls of run_job; accepted: a file that"),
        (
            [JOB, "--", *PLACES, "--shard", "x"],
            f"--shard: unknown flag; did you mean --shards? see python {JOB} --help",
        ),
        ([JOB, "--", *PLACES, "--recipe.epochs", "-1"], "--recipe.epochs: -1.0; accepted: above 0"),
        (
            ["shards write", "--", "cifar10:train", "/x"],
            "--data-dir: bit_ray_runs/datasets is a path on this machine; acc",
        ),
        # An embedded set needs no folder of published files: what is missing is the address.
        (["shards write", "--", "digits:test", "/x"], "--address: empty, and RAY_API_SERVER_ADDRESS is not set; "),
        ([JOB, "--", "--shards", "x/y", "--name", "a"], "--shards: x/y is a path on this machine; accepted: s3://"),
        (
            [JOB, "--", "--shards", "s3://b/s", "--name", "a"],
            "--storage: bit_ray_runs is a path on this machine; accepted: s3://..., gs://..., or an absolute path that "
            "all nodes share; name such a place",
        ),
        # It would be written on the head, in a folder that goes with the job.
        (
            ["predict", "--", "s3://b/images", "--model", "s3://b/m", "--storage", "s3://b/runs", "--output", "o.csv"],
            "--output: o.csv is a path on this machine; accepted: s3://",
        ),
        (
            [JOB, "--", *PLACES, "--tracking.uri", "http://me:PLANTED@host"],
            "--tracking.uri: http://***@host holds a password or a key; accepted: nothing secret, as everyone on",
        ),
        ([JOB, "--env", "HF_TOKEN=PLANTED", "--", *PLACES], "--env: HF_TOKEN looks like a secret; accepted: nothing"),
        ([JOB, "--env", "PROXY=http://me:PLANTED@h", "--", *PLACES], "--env: PROXY looks like a secret; accepted:"),
        ([JOB, "--env", "A B", "--", *PLACES], "--env: A B; accepted: NAME=VALUE; correct it"),
        ([JOB, "--", *PLACES], "--address: empty, and RAY_API_SERVER_ADDRESS is not set; accepted: http(s)://HEAD"),
        ([JOB, "--address", "ray://h:10001", "--", *PLACES], "--address: ray://h:10001; accepted: http(s)://HEAD:826"),
        ([JOB, "--address", "http://me:PLANTED@h:1", "--", *PLACES], "--address: http://***@h:1; accepted: http(s)://"),
        (
            [JOB, "--address", "http://127.0.0.1:9", "--", *PLACES],
            "--address: http://127.0.0.1:9 does not answer (conn",
        ),
    ],
)
def test_what_cannot_work_is_one_line(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *arguments]) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert line.startswith(f"error: {error}")
    assert "PLANTED" not in out + err


def test_a_job_that_other_code_would_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_code("worker 0")
    monkeypatch.setenv(identity.SUBMITTED_CODE, code_digest())
    check_code("worker 0")
    monkeypatch.setenv(identity.SUBMITTED_CODE, "0123456789ab")
    with pytest.raises(ConfigError, match=f"worker 0: runs bit_ray with the source digest {code_digest()}, from .*;"):
        check_code("worker 0")


def test_the_settings_of_a_job_are_those_of_its_own_config() -> None:
    from bit_ray.cli.submission import job_settings

    settings = job_settings(SubmitConfig(job=JOB, settings=tuple(PLACES)))
    assert isinstance(settings, PretrainConfig)
    assert settings.model == "R152x4"
    assert settings.shuffle.num_lanes == 512
    quickstart = SubmitConfig(job=str(ROOT / "jobs" / "quickstart.py"), settings=("--shots", "1", "--model", "R50x1"))
    assert type(job_settings(quickstart)).__name__ == "QuickstartConfig"
