"""What a user sets to submit a job. Imports neither PyTorch nor Ray nor MLflow."""

import re
from dataclasses import dataclass, field

from bit_ray.cluster.dashboard import ACCEPTED, check_address, dashboard_address
from bit_ray.errors import ConfigError
from bit_ray.uris import shown

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"key|secret|token|passw|pwd|credential", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Check in seconds whether a job would run on a cluster; what follows -- are the job's own settings."""

    job: str = field(metadata={"positional": "JOB"})
    """A file that calls run_job, such as jobs/pretrain_jft.py, or the name of a command, such as pretrain or "study
    run"."""
    settings: tuple[str, ...] = field(default=(), metadata={"positional": "ARGS"})
    """After --: the settings of the job, as it takes them itself."""
    address: str = ""
    """http(s)://HEAD:8265 of the cluster; empty: $RAY_API_SERVER_ADDRESS."""
    env: tuple[str, ...] = ()
    """NAME=VALUE, environment variables of the job and its workers. Everyone on the cluster can read them."""

    def __post_init__(self) -> None:
        if self.address:
            check_address(self.address)
        for item in self.env:
            name, equals, value = item.partition("=")
            if not equals or not _VARIABLE.fullmatch(name):
                raise ConfigError.of("env", shown(item), "NAME=VALUE", "correct it")
            if _SECRET_NAME.search(name) or shown(value) != value:
                remedy = "give it to the cluster's own processes: a role of the machine, a mounted secret, or a file"
                accepted = "nothing secret, as Ray keeps it readable in the job's record and logs"
                raise ConfigError.of("env", f"{name} looks like a secret", accepted, remedy)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by name."""
        return dict(item.split("=", 1) for item in self.env)


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(PreflightConfig):
    """Run a job on a Ray cluster with this machine's code; what follows -- are the job's own settings."""

    preflight: bool = True
    """Look first whether it would run."""
    wait: bool = True
    """Follow the job's log, and exit as the job does."""


def server_address(given: str) -> str:
    """Return the address of the cluster's job server: the given one, else the environment's.

    Raises:
        ConfigError: No address is given, or the one of the environment is not an address.
    """
    address = dashboard_address(given)
    if not address:
        raise ConfigError.of("address", "empty, and RAY_API_SERVER_ADDRESS is not set", ACCEPTED, "give one of them")
    return address
