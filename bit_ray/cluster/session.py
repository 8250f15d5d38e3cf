"""The Ray cluster a command runs on: the one it was submitted to, or a new one on this machine.

Anyone who can connect to a Ray cluster can run code on it. So a new cluster is for this user only: it listens on
127.0.0.1 only, requires a token that only this user can read, and has its sockets and logs in a folder that only this
user can enter.
"""

import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private.node import Node
from ray._raylet import Config  # type: ignore[attr-defined]

from bit_ray.cluster.autoscaler import Later, later
from bit_ray.cluster.slots import Resources, cpus_of_one, num_local_cores
from bit_ray.errors import ConfigError
from bit_ray.locks import locked

_OBJECT_STORE_BYTES = 512 * 1024**2
# Ray adds up to 64 characters for its sockets, whose paths may have 107.
_LONGEST_FOLDER = 40
_started_here = False


@contextmanager
def cluster() -> Iterator[Resources]:
    """Use the cluster of ``RAY_ADDRESS`` (which ``ray job submit`` sets), or start one here and stop it at the end.

    Inside another ``with cluster()`` the outer cluster is used.
    """
    global _started_here
    if ray.is_initialized():
        yield _resources(local=_started_here)
        return
    # Ray's progress bars would overwrite ours.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        try:
            yield _resources(local=False)
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _make_token()
    with _token_wanted():
        with _loopback_only(), without_observers():
            _start()
        _started_here = True
        try:
            yield _resources(local=True)
        finally:
            _started_here = False
            ray.shutdown()


def _start() -> None:
    """Start Ray on this machine.

    Raises:
        ConfigError: It did not start within Ray's time, as on a machine that is very busy.
    """
    try:
        ray.init(
            address="local",
            # Training workers and readers share the cores: Ray's CPUs are slots, and each of the two kinds needs its
            # own.
            num_cpus=2 * num_local_cores() + 1,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=_private_folder(),
        )
    except Exception as error:  # Ray has no type for it
        if "timed out during startup" not in str(error):
            raise
        raise ConfigError(
            "Ray did not start in time: this machine is too busy; start the command again later"
        ) from None


def quiet_ray_data() -> None:
    """Make Ray Data log neither our settings nor how much it has read."""
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)


@contextmanager
def _token_wanted() -> Iterator[None]:
    """Make a new cluster require the token, whatever ``RAY_AUTH_MODE`` says for other clusters."""
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray read the variable when it was imported
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_MODE"]
        if before is not None:
            os.environ["RAY_AUTH_MODE"] = before
        Config.initialize("")


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Make a new cluster listen on 127.0.0.1 only: a setting of Ray, by default on for Windows and macOS.

    Setting the address is not enough: Ray replaces it by the machine's external one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def without_observers() -> Iterator[None]:
    """Make a new cluster start without the processes that only observe it.

    They are a dashboard, whose count of users Ray waits for, the process that sends logs to the driver, which shows
    none, and an autoscaler. Ray has no setting for them, and their imports take seconds.
    """
    names = ("start_api_server", "start_log_monitor", "start_monitor")
    before = {name: getattr(Node, name) for name in names}
    for name in names:
        setattr(Node, name, lambda self, **_: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(Node, name, function)


def _make_token() -> None:
    """Make the token file, which Ray would let everyone read; make an existing one private.

    Raises:
        ConfigError: It cannot be read or written.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        if not named:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _size(path):
                lock = path.with_name(".auth_token.lock")
                with locked(lock, f"{path} is being written", remedy="wait for it", wait_s=10):
                    if not _size(path):
                        path.unlink(missing_ok=True)
                        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                            file.write(secrets.token_hex(32))
            _withdraw(path.parent, 0o022)  # a user who can write there could replace the token
        elif not path.stat().st_size:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {path} is empty; accepted: a file with a token; unset it")
        _withdraw(path, 0o077)
    except OSError as error:
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH: {path} cannot be used ({error.strerror or error}); accepted: a file with a token "
            "that you can read; set it to one, or set HOME to a folder that you can write to"
        ) from None


def _private_folder() -> str:
    """Return a folder for Ray's sockets, logs and spilled objects, inside one that only this user can enter.

    Ray opens its own folders to everyone, so the mode of the parent folder matters.

    Raises:
        ConfigError: Another user owns a folder of this name.
    """
    name = f"bit_ray-{os.getuid()}"
    places = [os.environ.get("RAY_TMPDIR", ""), os.environ.get("TMPDIR", ""), "/tmp"]
    folders = [Path(place, name).absolute() for place in places if place]
    folder = next((f for f in folders if len(os.fsencode(f / "ray")) <= _LONGEST_FOLDER), folders[-1])
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(0, "belongs to another user")
        _withdraw(folder, 0o077)
    except OSError as error:
        raise ConfigError(
            f"RAY_TMPDIR: {folder} cannot be used ({error.strerror or error}); accepted: a folder with a short path in "
            "which you can write; set it to one of your own"
        ) from None
    return str(folder / "ray")


def _withdraw(path: Path, mode: int) -> None:
    """Remove other users' permissions, if the file belongs to this user."""
    found = path.stat()
    if found.st_uid == os.getuid() and found.st_mode & mode:
        path.chmod(stat.S_IMODE(found.st_mode) & ~mode)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resources(*, local: bool) -> Resources:
    now = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_cpus, num_gpus = (int(sum(node.get(kind, 0) for node in now)) for kind in ("CPU", "GPU"))
    may_come = Later({}, []) if local else later()
    return Resources(
        len(now),
        num_cpus,
        num_gpus,
        local,
        num_cpus_later=int(may_come.size.get("CPU", 0)),
        num_gpus_later=int(may_come.size.get("GPU", 0)),
        cpus_of_one=cpus_of_one([*now, *may_come.nodes]),
    )


def start_no_other_ray() -> None:
    """Keep Ray from starting anew in this process for a thread that asks it something after its end."""
    with suppress(ImportError):  # a private name
        from ray._private import auto_init_hook

        auto_init_hook.enable_auto_connect = False
