"""Several hosts on this machine: network namespaces, each with an address and a name of its own, on one bridge.

Only root on Linux can make them, with Debian's iproute2 and iptables. A host sees this machine's files, but its own
/tmp/ray; it reaches the other hosts and nothing else. What an earlier process has left of the same number is ended and
removed.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

MISSING = "no network namespaces can be made (root on Linux; Debian: iproute2, iptables)"
# As `ip netns exec`, but with names that only the host's processes see. The process that this starts is the command.
ENTER = """
mount --bind "$1/ray" /tmp/ray && mount --bind "$2" /etc/hosts && hostname "$3" && shift 3 && exec "$@"
"""


def possible() -> bool:
    """Whether this process can make hosts."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "bridge", "tc", "iptables", "unshare"))):
        return False
    with (
        contextlib.suppress(subprocess.CalledProcessError),
        Hosts(Path(f"/tmp/brh-{os.getpid()}"), "a", number=99) as hosts,
        hosts["a"].lossy(0.5),
    ):
        return True
    return False


class Host:
    """One of them."""

    def __init__(self, hosts: "Hosts", name: str, address: str) -> None:
        self.name, self.address = name, address
        self.folder = hosts.folder / name
        self.port = f"{hosts.prefix}{name}"
        """Its end of the cable on the bridge, and its namespace."""
        self._hosts = hosts
        (self.folder / "ray").mkdir(parents=True)
        ip("netns", "add", self.port)
        ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", self.port)
        ip("link", "set", self.port, "master", hosts.bridge, "up")
        ip("-n", self.port, "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("eth0", "lo"):
            ip("-n", self.port, "link", "set", interface, "up")

    def enter(self, *command: str) -> list[str]:
        """Return what carries out a command on it."""
        names = [str(self.folder), str(self._hosts.names), self.name]
        unshare = ["unshare", "--uts", "--mount", "--propagation", "private"]
        return ["ip", "netns", "exec", self.port, *unshare, "sh", "-c", ENTER, "sh", *names, *command]

    def start(self, *command: str, log: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        """Start a command, whose output is added to a file of its folder."""
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                self.enter(*command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def log(self, log: str) -> str:
        """Return what such a file has."""
        file = self.folder / log
        return file.read_text(errors="replace") if file.exists() else ""

    def pids(self) -> list[int]:
        """Return all processes that run on it."""
        return pids(self.port)

    def running(self, what: str) -> list[int]:
        """Return those with this in their command."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                if what in " ".join(psutil.Process(pid).cmdline()):
                    found.append(pid)
        return found

    def kill(self, what: str = "") -> None:
        """End all that runs on it, or the processes with this in their command, at once."""
        if not what:
            end(self.port)
            return
        for pid in self.running(what):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def halt(self) -> None:
        """Halt all that runs on it, as a machine that hangs."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """End the halt."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def cut_off(self) -> None:
        """Pull its cable."""
        ip("link", "set", self.port, "down")

    def reconnect(self) -> None:
        """Plug it in again."""
        ip("link", "set", self.port, "up")

    @contextlib.contextmanager
    def slow(self, rate: str) -> Iterator[None]:
        """Make it receive at most so much, such as ``2mbit``."""
        run(
            "tc", "qdisc", "replace", "dev", self.port, "root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms"
        )
        yield
        run("tc", "qdisc", "del", "dev", self.port, "root")

    @contextlib.contextmanager
    def lossy(self, share: float) -> Iterator[None]:
        """Let it lose this share of the packets that come from others, each by chance."""
        loses = (
            "INPUT",
            "-i",
            "eth0",
            "-m",
            "statistic",
            "--mode",
            "random",
            "--probability",
            str(share),
            "-j",
            "DROP",
        )
        ip("netns", "exec", self.port, "iptables", "-A", *loses)
        yield
        ip("netns", "exec", self.port, "iptables", "-D", *loses)


class Hosts:
    """A set of hosts, made on entry and removed with all that runs on them; by name as ``hosts["a"]``."""

    def __init__(self, folder: Path, *names: str, number: int) -> None:
        """Nothing is made yet.

        Args:
            folder: New folder for what is of each host.
            names: Of the hosts, short.
            number: Of the set, 0 to 99: another set has another one; a second process with the same waits.
        """
        self.folder, self.names = folder, folder / "hosts"
        self.prefix, self.bridge, self._network = f"brh{number}-", f"brh{number}", f"10.77.{number}"
        self._wanted = names
        self._hosts: dict[str, Host] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Hosts":
        self._lock = open(f"/run/{self.bridge}.lock", "w")  # noqa: SIM115  # held until the end
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._remove()
        Path("/tmp/ray").mkdir(exist_ok=True)  # what each host has its own of
        self.folder.mkdir(parents=True)
        addresses = {name: f"{self._network}.{11 + index}" for index, name in enumerate(self._wanted)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self.names.write_text("\n".join(lines) + "\n")
        try:
            ip("link", "add", self.bridge, "type", "bridge")
            ip("address", "add", f"{self._network}.1/24", "dev", self.bridge)
            ip("link", "set", self.bridge, "up")
            for name, address in addresses.items():
                self._hosts[name] = Host(self, name, address)
        except subprocess.CalledProcessError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()
        if self._lock is not None:
            self._lock.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    @contextlib.contextmanager
    def apart(self, *names: str) -> Iterator[None]:
        """Let some hosts no longer hear of each other, though all others hear of them."""
        for name in names:
            run("bridge", "link", "set", "dev", self[name].port, "isolated", "on")
        yield
        for name in names:
            run("bridge", "link", "set", "dev", self[name].port, "isolated", "off")

    def _remove(self) -> None:
        for line in ip("netns", "list").splitlines():
            if line.startswith(self.prefix):
                namespace = line.split()[0]
                end(namespace)
                ip("netns", "delete", namespace)
        # A cable would go with its namespace, but not before the last of its processes has.
        for device in Path("/sys/class/net").iterdir():
            if device.name == self.bridge or device.name.startswith(self.prefix):
                with contextlib.suppress(subprocess.CalledProcessError):  # it has just gone
                    ip("link", "delete", device.name)
        shutil.rmtree(self.folder, ignore_errors=True)


def run(*command: str) -> str:
    """Run a command that must succeed; return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def ip(*arguments: str) -> str:
    return run("ip", *arguments)


def pids(namespace: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", namespace).split()]


def end(namespace: str) -> None:
    deadline = time.monotonic() + 30
    while found := pids(namespace):
        assert time.monotonic() < deadline, f"processes {found} in {namespace} do not end"
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def environment(**more: str) -> dict[str, Any]:
    """Return this process's environment for one on a host."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | more
