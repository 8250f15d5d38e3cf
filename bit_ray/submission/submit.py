"""From a job's name and settings to a job that runs on a cluster, and its exit status here."""

import json
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray

from bit_ray.config import to_dict
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.progress import console
from bit_ray.submission.config import PreflightConfig, SubmitConfig, server_address
from bit_ray.submission.follow import Follower
from bit_ray.submission.machine import CLIENT, Machine, release
from bit_ray.submission.refusals import check_places, check_secrets
from bit_ray.submission.server import JobServer
from bit_ray.submission.stage import Staged, staged
from bit_ray.tracking.identity import SUBMITTED_CODE, code_digest

INTERRUPTED_STATUS = 130
SECONDS_TO_SAVE = 120
"""What a job has between `ray job stop` and its end, to save a checkpoint; Ray's default is 3."""
_LEAST_PYTHON, _LEAST_RAY = (3, 11), (2, 60)
_SECONDS_TO_END = 15.0


def submit(config: SubmitConfig, settings: Any) -> int:
    """Submit a job; follow it to its end, unless that is not wanted, and return its exit status.

    Args:
        config: What is submitted, and where to.
        settings: The job's settings, parsed by the job's own config.

    Raises:
        BitRayError: It cannot work, which is found before anything is uploaded where it can be.
    """
    server, extension = _reach(config, settings)
    variables = {
        **config.variables,
        SUBMITTED_CODE: code_digest(),
        "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_SAVE),
    }
    with staged(config.job, config.settings, extension=extension) as upload:
        if config.preflight:
            status = _preflight(server, upload, config.variables)
            if status:
                return status
        job = server.submit_job(entrypoint=upload.command, runtime_env=_environment(upload, variables))
    console.print(f"Submitted: {job} to {server.given}, bit_ray {code_digest()}, {upload.num_bytes / 1e6:,.1f} MB")
    _print_commands(server, job)
    return _followed(server, job) if config.wait else 0


def submit_preflight(config: PreflightConfig, settings: Any) -> int:
    """Run the preflight of a job as a job of its own; return its exit status. See `submit`."""
    server, extension = _reach(config, settings)
    with staged(config.job, config.settings, extension=extension) as upload:
        return _preflight(server, upload, config.variables)


def _reach(config: PreflightConfig, settings: Any) -> tuple[JobServer, bool]:
    """Refuse what cannot work; return the server, and whether its Python can load the compiled decoder."""
    check_secrets(settings)
    check_places(settings)
    server = JobServer(server_address(config.address))
    python, ray_version = server.versions()
    if (found := release(python)) and found < _LEAST_PYTHON:
        raise ConfigError.of("address", f"{server.given} runs Python {python}", "3.11 or newer", "use another image")
    if (found := release(ray_version)) and found < _LEAST_RAY:
        raise ConfigError.of("address", f"{server.given} runs Ray {ray_version}", "2.60 or newer", "use another image")
    if release(ray_version) != release(ray.__version__):
        console.print(f"warning: Ray {ray_version} on the cluster, {ray.__version__} here")
    here = platform.python_version()
    extension = release(python) in ((), release(here))
    if not extension:
        console.print(
            f"warning: Python {python} on the cluster, {here} here: the compiled decoder is left out, and photographs "
            "decode slower; use an image with bit_ray installed as a wheel"
        )
    return server, extension


def _environment(upload: Staged, variables: Mapping[str, str]) -> dict[str, Any]:
    return {
        "working_dir": str(upload.working_dir),
        "py_modules": [str(upload.package)],
        "env_vars": dict(variables),
    }


def _preflight(server: JobServer, upload: Staged, variables: Mapping[str, str]) -> int:
    """Run the preflight as a job, which leaves no record; return its exit status."""
    sent = {**variables, SUBMITTED_CODE: code_digest(), CLIENT: json.dumps(to_dict(Machine.here()))}
    console.print(f"Preflight on {server.given}, which takes some seconds; --no-preflight leaves it out")
    job = server.submit_job(entrypoint=upload.preflight, runtime_env=_environment(upload, sent))
    try:
        return Follower(server, job, quiet=True).follow()
    finally:
        _delete(server, job)


def _delete(server: JobServer, job: str) -> None:
    with suppress(BitRayError):
        deadline = time.monotonic() + _SECONDS_TO_END
        while not server.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            server.stop_job(job)
            time.sleep(0.5)
        server.delete_job(job)


def _print_commands(server: JobServer, job: str) -> None:
    console.print(f"Follow:    ray job logs --follow --address {server.given} {job}")
    console.print(f"Stop:      ray job stop --address {server.given} {job}")


def _followed(server: JobServer, job: str) -> int:
    follower = Follower(server, job)
    try:
        return follower.follow()
    except KeyboardInterrupt:
        console.print(f"\n{job} goes on running.")
        if not _wants_to_stop():
            _print_commands(server, job)
            return INTERRUPTED_STATUS
    server.stop_job(job)
    console.print(f"Stopping: it may save for up to {SECONDS_TO_SAVE} s; Ctrl-C waits no longer.")
    try:
        return follower.follow()
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS


def _wants_to_stop() -> bool:
    """Ask whether to stop the job; where nobody can answer, it goes on."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return input("Stop it? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
