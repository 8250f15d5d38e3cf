"""A cluster's job server over HTTP: what it says, what it is asked for, and its failures in one line each."""

import logging
import os
from typing import Any, NamedTuple

import requests
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from bit_ray.cluster.dashboard import ACCEPTED
from bit_ray.errors import BitRayError, ConfigError, connection_reason

_CONNECT_S, _ANSWER_S = 5.0, 60.0
_TOKEN = "the cluster's token, by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE or RAY_AUTH_TOKEN"

# It tells which packages are uploaded; we do.
logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)


class UnreachableError(BitRayError):
    """The job server does not answer now; it may later."""


class Versions(NamedTuple):
    """What runs on the head."""

    python: str
    ray: str


class JobServer(JobSubmissionClient):
    """Ray's client with time-outs, and errors of one line."""

    def __init__(self, address: str) -> None:
        """Reach the server.

        Raises:
            ConfigError: It does not answer, is not such a server, or refuses the token.
        """
        token_header()
        # Ray's client lets the environment override what it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.given = address
        super().__init__(address)

    def versions(self) -> Versions:
        """Return the versions of Python and Ray on the head.

        Raises:
            ConfigError: Something else than Ray answers.
        """
        reply = self._do_request("GET", "/api/v0/cluster_metadata")
        try:
            data = dict(reply.json()["data"]) if reply.status_code == 200 else {}
        except (ValueError, TypeError, KeyError):
            raise self._no_server(reply) from None
        return Versions(str(data.get("pythonVersion", "unknown")), str(data.get("rayVersion", "unknown")))

    def _do_request(self, method: str, endpoint: str, **rest: Any) -> requests.Response:
        """Send a request; every method of Ray's client goes through here.

        Raises:
            UnreachableError: No answer came.
            ConfigError: The answer is not that of a job server, or a refusal.
        """
        rest.setdefault("timeout", (_CONNECT_S, _ANSWER_S))
        sent = token_header()
        try:
            json = rest.pop("json_data", None)
            reply = requests.request(
                method, self._address + endpoint, headers=sent, json=json, allow_redirects=False, **rest
            )
        except requests.RequestException as error:
            raise UnreachableError.of(
                "address",
                f"{self.given} does not answer ({connection_reason(error, _CONNECT_S) or type(error).__name__})",
                ACCEPTED,
                "start the cluster, or open a tunnel to its head",
            ) from None
        if reply.status_code == 401 or (reply.status_code == 403 and not sent):
            given = f"{self.given} wants a token, and " + ("got none that it knows" if sent else "none was sent")
            raise ConfigError.of("address", given, _TOKEN, "set them")
        if reply.status_code == 403:
            raise ConfigError.of("address", f"{self.given} refuses the token that was sent", _TOKEN, "correct it")
        if endpoint == "/api/version" and "ray_version" not in reply.text:
            raise self._no_server(reply)
        if reply.status_code >= 500:
            last = (reply.text.strip().splitlines() or ["no reason"])[-1]
            raise UnreachableError.of("address", f"{self.given}: {last[:300]} (HTTP {reply.status_code})")
        return reply

    def _no_server(self, reply: requests.Response) -> ConfigError:
        given = f"{self.given}: not the answer of a Ray job server (HTTP {reply.status_code})"
        return ConfigError.of("address", given, ACCEPTED, "correct it")

    def _raise_error(self, r: requests.Response) -> None:
        text = (r.text.strip().splitlines() or ["no reason"])[-1]
        raise ConfigError.of("address", f"{self.given}: {text[:300]} (HTTP {r.status_code})", remedy="correct the job")


def token_header() -> dict[str, str]:
    """Return the HTTP header with the cluster's token; empty where the environment asks for none.

    Raises:
        ConfigError: It asks for one, and there is none that can be read.
    """
    try:
        return dict(get_auth_headers_if_auth_enabled({}))
    except AuthenticationError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError.of("RAY_AUTH_MODE", f"token, but {reason}", _TOKEN, "set one of them") from None
