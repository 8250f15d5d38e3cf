"""Answers that no Ray gives; those of a real one are test_job_submit.py's."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bit_ray.cluster.dashboard import Job, NoAnswerError, dashboard_address, jobs, nodes
from bit_ray.errors import ConfigError


class _Server(http.server.ThreadingHTTPServer):
    status, body = 200, b"[]"
    answers: dict[str, object] = {}  # lists, by a part of what is asked

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization", ""))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", f"{self.server.address}/elsewhere")
        body = self.server.body
        if found := [listed for part, listed in self.server.answers.items() if part in self.path]:
            body = json.dumps({"data": {"result": {"result": found[0]}}}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken")
    found = _Server()
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_job_is_known_by_the_name_in_its_command_the_newest_first(server: _Server) -> None:
    submitted = [
        {
            "submission_id": "a",
            "status": "FAILED",
            "entrypoint": "python jobs/pretrain.py --name=jft",
            "start_time": 1000,
        },
        {"submission_id": "b", "status": "RUNNING", "entrypoint": "python x.py --name 'one two'", "start_time": 2000},
        {"submission_id": None, "status": "RUNNING", "entrypoint": "a driver"},
        {"submission_id": "c", "status": 3, "entrypoint": "unbalanced '", "start_time": "soon", "end_time": [1]},
        "x",
    ]
    server.body = json.dumps(submitted).encode()
    assert jobs(server.address) == [
        Job(id="b", state="running", run="one two", started_s=2.0, ended_s=0.0),
        Job(id="a", state="failed", run="jft", started_s=1.0, ended_s=0.0),
        Job(id="c", state="", run="", started_s=0.0, ended_s=0.0),
    ]
    assert server.tokens == ["Bearer t0ken"]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (401, b"", r"^address: http://\S+ refuses the token \(HTTP 401\); set RAY_AUTH_TOKEN_PATH"),
        (302, b"", r"^address: .*answers with HTTP 302; accepted: http\(s\)://HEAD:8265"),
        (200, b"<html>", "^address: .* is not a Ray dashboard"),
        (200, b"[" * 100_000, "^address: .* is not a Ray dashboard"),
    ],
)
def test_what_is_no_answer_of_ray_is_one_line_and_the_token_follows_no_redirect(
    server: _Server, status: int, body: bytes, error: str
) -> None:
    server.status, server.body = status, body
    with pytest.raises(ConfigError, match=error):
        jobs(server.address)
    assert len(server.tokens) == 1


@pytest.mark.parametrize(
    "body", [b"null", b"3", b'{"data": {"result": 3}}', b'{"data": {"result": {"result": {"a": 1}}}}']
)
def test_an_answer_of_another_form_has_no_nodes(server: _Server, body: bytes) -> None:
    server.body = body
    assert nodes(server.address) == []


@pytest.mark.parametrize("num_tasks", [3, 10_000])  # so many are all that Ray lists: some may be left out
def test_a_node_is_idle_since_the_last_task_on_it_ended(server: _Server, num_tasks: int) -> None:
    resources = {"CPU": 4.0}
    node = {"node_id": "a", "node_ip": "10.0.0.3", "resources_total": resources, "start_time_ms": 1_000_000}
    server.answers = {
        "/api/v0/nodes": [
            node,
            {**node, "node_id": "b", "node_ip": "10.0.0.4"},
            {"node_id": "c", "node_ip": "10.0.0.5"},
        ],
        "/api/v0/tasks?detail=true": [
            {"node_id": "a", "end_time_ms": 1_500_000},
            {"node_id": "a", "end_time_ms": None},
            *[{"node_id": "gone", "end_time_ms": 1_900_000}] * (num_tasks - 2),
        ],
        "filter_keys=node_id&filter_predicates=%3D&filter_values=a&": [{"node_id": "a", "end_time_ms": 1_600_000}],
    }
    first, second, third = nodes(server.address)
    assert (first.is_idle, first.idle_since_s) == (True, 1500.0 if num_tasks == 3 else 1600.0)
    assert (second.is_idle, second.idle_since_s) == (True, 1000.0)  # since it came
    assert (third.is_idle, third.idle_since_s) == (False, 0.0)  # it has nothing to work with


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = [
    "data",
    "result",
    "submission_id",
    "entrypoint",
    "status",
    "start_time",
    "bundles",
    "node_id",
    "resources_total",
]
KEYS += ["CPU", "GPU", "required_resources", "is_head_node", "node_ip"]
TREE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)


@given(items=st.lists(st.dictionaries(st.sampled_from(KEYS), TREE, max_size=6), max_size=3))
@settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_answer_breaks_it_and_nothing_of_it_steers_a_terminal(server: _Server, items: list[object]) -> None:
    server.body = json.dumps(items).encode()
    assert all(f"{job.id}{job.run}{job.state}".isprintable() for job in jobs(server.address))
    server.body = json.dumps({"data": {"result": {"result": items}}}).encode()
    found = nodes(server.address)
    assert len(found) == len(items)
    assert all(node.address.isprintable() and node.num_cpus >= 0 for node in found)


def test_no_answer_is_told_apart(server: _Server) -> None:
    server.server_close()
    server.shutdown()
    with pytest.raises(NoAnswerError, match="^no answer from http://127.0.0.1:"):
        jobs(server.address)


def test_the_address_is_the_given_one_or_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dashboard_address("") == ""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # inside a job
    assert dashboard_address("") == ""
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert dashboard_address("") == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265/")
    assert dashboard_address("") == "http://other:8265"
    assert dashboard_address("https://given") == "https://given"
    for wrong in ("head:8265", "ftp://head", "http://", "http://user:secret@head", "http://[x"):
        with pytest.raises(ConfigError, match="^address: "):
            dashboard_address(wrong)
