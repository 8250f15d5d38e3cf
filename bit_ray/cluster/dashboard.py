"""What a running cluster says of itself over HTTP: its jobs and its nodes. Needs neither Ray nor a connection to it."""

import json
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from bit_ray.errors import BitRayError, ConfigError
from bit_ray.uris import shown

_MOST_BYTES = 64 * 2**20
_MOST_LISTED = 10_000  # Ray takes no higher limit
_SECONDS_TO_ANSWER = 10.0
ACCEPTED = "http(s)://HEAD:8265, where the cluster's dashboard listens"


class NoAnswerError(BitRayError):
    """Nothing answers at the address: the cluster is gone, or out of reach."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job that was submitted to the cluster."""

    id: str
    state: str
    """As Ray says it, in small letters, such as ``running`` or ``succeeded``."""
    run: str
    """The ``--name`` in its command; empty without one."""
    started_s: float
    """Unix seconds; 0 if not known."""
    ended_s: float
    """Unix seconds; 0 while it runs."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node that is alive."""

    address: str
    num_cpus: int
    num_gpus: int
    is_head: bool
    is_idle: bool
    """Whether it could work, and nothing runs on it or has room reserved."""
    idle_since_s: float = 0.0
    """Unix seconds since when, as far as Ray remembers the tasks that ran on it; 0 if it is not idle."""


def dashboard_address(given: str) -> str:
    """Return the URL that commands ask: the given one, or that of ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS``.

    It is empty without any; ``RAY_ADDRESS`` counts only if it is a URL, since inside a job it is not the dashboard's.

    Raises:
        ConfigError: It is no URL.
    """
    inside = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS", "") or (inside if "://" in inside else "")
    if address:
        check_address(address)
    return address.rstrip("/")


def check_address(address: str) -> None:
    """Refuse what is not the URL of a dashboard, which is also that of the job server.

    Raises:
        ConfigError: It is refused.
    """
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and (parts.port is not None or ":" not in parts.netloc.rpartition("]")[2].rpartition("@")[2])
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError.of("address", shown(address), ACCEPTED, "correct it")
    if "@" in parts.netloc:
        raise ConfigError.of("address", shown(address), ACCEPTED, "leave user and password out, and set RAY_AUTH_TOKEN")


def jobs(address: str) -> list[Job]:
    """Return the jobs that were submitted, the newest first.

    Raises:
        NoAnswerError: Nothing answers.
        ConfigError: The token is refused, or something else than Ray answers.
    """
    found = _ask(address, "/api/jobs/")
    listed = [_job(job) for job in _list(found) if _text(job, "submission_id")]
    return sorted(listed, key=lambda job: -job.started_s)


def nodes(address: str) -> list[Node]:
    """Return the nodes that are alive, the head first.

    Raises:
        NoAnswerError: Nothing answers.
        ConfigError: The token is refused, or something else than Ray answers.
    """
    busy = {_text(actor, "node_id") for actor in _listed(address, "actors", "ALIVE") if _takes(actor)}
    busy |= {_text(task, "node_id") for task in _listed(address, "tasks", "RUNNING")}
    for group in _listed(address, "placement_groups", "CREATED"):
        busy |= {_text(bundle, "node_id") for bundle in _list(group.get("bundles"))}
    listed = _listed(address, "nodes", "ALIVE")
    ended = _last_ends(address, {_text(node, "node_id") for node in listed if _could_work(node)} - busy)
    alive = [_node(node, ended) for node in listed]
    return sorted(alive, key=lambda node: (not node.is_head, node.address))


def _last_ends(address: str, idle: set[str]) -> dict[str, float]:
    """Return when the last task on each of some nodes ended, Unix milliseconds; 0 where Ray remembers none."""
    tasks = _listed(address, "tasks") if idle else []
    if len(tasks) >= _MOST_LISTED:  # then some are left out
        tasks = [task for node in sorted(idle) for task in _listed(address, "tasks", node, "node_id")]
    ended = dict.fromkeys(idle, 0.0)
    for task in tasks:
        if (node := _text(task, "node_id")) in ended:
            ended[node] = max(ended[node], _number(task, "end_time_ms"))
    return ended


def _listed(address: str, kind: str, value: str = "", key: str = "state") -> list[Mapping[str, Any]]:
    """Return what Ray's state API lists of a kind, all or in one state or with another value."""
    only = f"filter_keys={key}&filter_predicates=%3D&filter_values={quote(value)}&" if value else ""
    found = _ask(address, f"/api/v0/{kind}?{only}detail=true&limit={_MOST_LISTED}")
    return _list(_mapping(_mapping(found, "data"), "result").get("result"))


def _could_work(node: Mapping[str, Any]) -> bool:
    return any(int(_number(_mapping(node, "resources_total"), kind)) for kind in ("CPU", "GPU"))


def _takes(actor: Mapping[str, Any]) -> bool:
    return any(_number(_mapping(actor, "required_resources"), kind) for kind in ("CPU", "GPU"))


def _job(job: Mapping[str, Any]) -> Job:
    try:
        words = shlex.split(_text(job, "entrypoint"))
    except ValueError:
        words = []
    named = [after for word, after in zip(words, words[1:], strict=False) if word == "--name"]
    return Job(
        id=_text(job, "submission_id"),
        state=_text(job, "status").lower(),
        run=named[-1] if named else next((w[7:] for w in words if w.startswith("--name=")), ""),
        started_s=_number(job, "start_time") / 1000,
        ended_s=_number(job, "end_time") / 1000,
    )


def _node(node: Mapping[str, Any], ended: Mapping[str, float]) -> Node:
    resources, last = _mapping(node, "resources_total"), ended.get(_text(node, "node_id"))
    return Node(
        address=_text(node, "node_ip"),
        num_cpus=int(_number(resources, "CPU")),
        num_gpus=int(_number(resources, "GPU")),
        is_head=node.get("is_head_node") is True,
        is_idle=last is not None,
        # Ray's own "idle for so long" is not told over HTTP, and is as old as the node where no autoscaler runs.
        idle_since_s=max(_number(node, "start_time_ms"), last) / 1000 if last is not None else 0.0,
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""


def _ask(address: str, path: str) -> Any:
    token = _token()
    request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_SECONDS_TO_ANSWER) as answer:
            data = answer.read(_MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            given = f"{address} refuses the token" if token else f"{address} asks for a token"
            remedy = "set RAY_AUTH_TOKEN_PATH to the cluster's token file, or RAY_AUTH_TOKEN"
            raise ConfigError.of("address", f"{given} (HTTP {error.code})", remedy=remedy) from None
        raise ConfigError.of("address", f"{address}{path} answers with HTTP {error.code}", ACCEPTED) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise NoAnswerError(f"no answer from {address} ({said})") from None
    try:
        return json.loads(data) if len(data) <= _MOST_BYTES else None
    except (ValueError, RecursionError):
        raise ConfigError.of("address", f"{address} is not a Ray dashboard", ACCEPTED) from None


def _token() -> str:
    """Return the cluster's token, from where Ray looks for it; empty if there is none.

    Raises:
        ConfigError: The file that the environment names cannot be read.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        if not named:
            return ""
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError.of(
            "RAY_AUTH_TOKEN_PATH", f"{path} cannot be read ({reason})", "a file with a token"
        ) from None
    if not token.isascii() or not token.isprintable():
        raise ConfigError.of("RAY_AUTH_TOKEN_PATH", f"{path} has no token in it", "a file with a token")
    return token


def _list(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    found = value.get(key) if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _text(value: Mapping[str, Any], key: str) -> str:
    """Return a text without control characters, which a terminal would act on."""
    found = value.get(key)
    return "".join(c if c.isprintable() else "?" for c in found[:4096]) if isinstance(found, str) else ""


def _number(value: Mapping[str, Any], key: str) -> float:
    """Return a number, which Ray writes as text where it has 64 bits; 0 for anything else."""
    try:
        found = float(value.get(key) or 0)
    except (TypeError, ValueError):
        return 0.0
    return found if 0 <= found < 1e15 else 0.0
