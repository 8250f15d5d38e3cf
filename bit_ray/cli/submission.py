"""``bit-ray submit`` and ``bit-ray preflight``: a job with its settings, on a cluster."""

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bit_ray.cli.flags import parse
from bit_ray.cli.typed import as_typed, command
from bit_ray.errors import BitRayError, ConfigError
from bit_ray.progress import console
from bit_ray.submission.config import PreflightConfig, SubmitConfig

_WIDTHS = 8, 12


def submit(config: SubmitConfig) -> None:
    """Submit a job, follow it, and end this process as the job ended."""
    settings = job_settings(config)
    from bit_ray.submission.submit import submit

    with _named_for(SubmitConfig):
        _end(submit(config, settings))


def preflight(config: PreflightConfig) -> None:
    """Check whether a job would run: from outside the cluster as a job, inside it in this process."""
    settings = job_settings(config)
    inside = os.environ.get("RAY_ADDRESS", "")
    if config.address or not inside or inside.startswith("http"):
        from bit_ray.submission.submit import submit_preflight

        with _named_for(PreflightConfig):
            _end(submit_preflight(config, settings))
        return
    from bit_ray.submission.preflight import check_job

    failures: list[BitRayError] = []
    num_checks = 0
    for check, state, found in check_job(settings):
        num_checks += 1
        if isinstance(found, BitRayError):
            found = as_typed(found)
            failures.append(found)
        first, second = _WIDTHS
        console.print(f"{state:<{first}}{check:<{second}}{found}")
    if failures:
        raise ConfigError(f"preflight: {len(failures)} of {num_checks} checks failed, as said above; mend them first")
    console.print(f"Preflight: {num_checks} checks, none failed")


@contextmanager
def _named_for(cls: type[Any]) -> Iterator[None]:
    """Rename the setting in an error to its flag: of ``cls``, or of the job, whose config `job_settings` has set."""
    try:
        yield
    except BitRayError as error:
        for_job, _ = command.get(), command.set(cls)
        error = as_typed(error)
        command.set(for_job)
        raise error from None


def job_settings(config: PreflightConfig) -> Any:
    """Return the settings of a job, parsed by its own config; from now on errors name the flags of that config.

    Raises:
        ConfigError: There is no such job, or its settings are refused.
    """
    from bit_ray.cli.main import COMMANDS, GROUPS

    path = Path(config.job)
    if path.suffix == ".py":
        cls, defaults = _run_job_of(path)
        prog = f"python {config.job}"
    elif config.job in COMMANDS and config.job not in GROUPS["cluster"]:
        cls, defaults, prog = COMMANDS[config.job].config, {}, f"bit-ray {config.job}"
    else:
        given = f"{config.job}: no such job"
        remedy = 'correct it; a command of two words in quotes, as "study run"'
        raise ConfigError.of("job", given, "a file of jobs/, or the name of a command", remedy)
    return parse(cls, config.settings, prog=prog, **defaults)


def _run_job_of(path: Path) -> tuple[type[Any], dict[str, Any]]:
    """Return the config and the defaults that a job's file hands to ``run_job``, without running the job.

    Raises:
        ConfigError: There is no such file, or it hands over none.
    """
    accepted = "a file that calls run_job(function, Config), as those of jobs/"
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError.of("job", f"{path}: {error.strerror}", accepted, "correct the path") from None
    except SyntaxError as error:
        raise ConfigError.of("job", f"{path}: line {error.lineno}: {error.msg}", accepted) from None
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run_job"
    ]
    if len(calls) != 1:
        remedy = "let it, or submit it by ray job submit"
        raise ConfigError.of("job", f"{path}: {len(calls)} calls of run_job", accepted, remedy)
    found: list[tuple[type[Any], dict[str, Any]]] = []
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec = importlib.util.spec_from_file_location("bit_ray_job", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its config's texts are found by it
        spec.loader.exec_module(module)  # its name is not __main__: the call itself is not reached
        module.run_job = lambda function, cls, **defaults: found.append((cls, defaults))  # type: ignore[attr-defined]
        eval(compile(ast.Expression(calls[0]), str(path), "eval"), module.__dict__)
    except Exception as error:  # of the user's own code
        raise ConfigError.of("job", f"{path}: {type(error).__name__}: {error}", accepted, "correct the file") from None
    finally:
        sys.path.pop(0)
    return found[0]


def _end(status: int) -> None:
    if status:
        raise SystemExit(status)
