"""Claims in a real object store: one holder at a time, whatever the holders do or have done to them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from faulty_s3 import Faults, FaultyS3
from s3_server import Bucket

from bit_ray import claim
from bit_ray.claim import claimed
from bit_ray.errors import ConfigError

pytestmark = pytest.mark.cluster

# Holds one URI after the other, each until it is told to go on. It beats fast, and says on which machine it is.
HOLD = """
import sys, uuid
from bit_ray import claim
from bit_ray.errors import ConfigError
where, settle_s, *uris = sys.argv[1:]
claim.BEAT_S, claim.STALE_S, claim.SETTLE_S = 0.3, 3.0, float(settle_s)
if where == "elsewhere":
    name = uuid.uuid4().hex
    claim._machine = lambda: name
for uri in uris:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with claim.claimed(uri, "name: run is being run", remedy="wait for it"):
            print("held", flush=True)
            sys.stdin.readline()
        print("ended", flush=True)
    except ConfigError as error:
        print(error, flush=True)
"""


class Holder:
    """A process that claims when it is told to."""

    def __init__(
        self, *uris: str, where: str = "here", before: Callable[[], object] | None = None, settle_s: float = 0.5
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, where, str(settle_s), *uris], preexec_fn=before,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def hold(self) -> None:
        assert self.answer() == "ready"
        self.go_on()
        assert self.answer() == "held"


@contextmanager
def holders(*all_of_them: Holder) -> Iterator[None]:
    with ExitStack() as stack:
        for holder in all_of_them:
            stack.enter_context(holder.process)
            stack.callback(holder.process.kill)
        yield


def objects(s3: Bucket) -> list[str]:
    """Keys, without the empty directories that Arrow leaves."""
    return [key for key in s3.keys() if not key.endswith("/")]  # noqa: SIM118


def beat(s3: Bucket) -> int:
    """How often the holder of ``x`` has shown that it is alive."""
    return int(json.loads(s3.client.get_object(Bucket=s3.bucket, Key="x/_running.json")["Body"].read())["beat"])


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT_S", 0.3), ("STALE_S", 3.0), ("SETTLE_S", 0.5), ("_POLL_S", 0.1)):
        monkeypatch.setattr(claim, name, seconds)


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_second_start_is_told_who_works_in_the_store(s3: Bucket, where: str) -> None:
    uri = s3.uri("runs/x/_running.json")
    with holders(holder := Holder(uri, where=where)):
        holder.hold()
        with pytest.raises(ConfigError) as caught, claimed(uri, "name: x is being run", remedy="wait for it"):
            raise AssertionError("held twice")
        assert re.fullmatch(
            rf"name: x is being run by PID {holder.process.pid} of \S+ on \S+ since .+ \(-c .*\); wait for it",
            str(caught.value),
        )
        holder.go_on()
        assert holder.answer() == "ended"
    assert objects(s3) == []


def test_of_processes_that_start_at_once_one_works(s3: Bucket) -> None:
    uris = [s3.uri(f"{number}/_running.json") for number in range(3)]
    # Longer than a busy machine takes from seeing that nobody is there to having written.
    starting = [Holder(*uris, where="elsewhere", settle_s=5.0) for _ in range(4)]
    with holders(*starting):
        for _ in uris:
            assert {holder.answer() for holder in starting} == {"ready"}
            for holder in starting:
                holder.go_on()
            answers = [holder.answer() for holder in starting]
            assert answers.count("held") == 1, answers
            [winner] = [holder for holder, text in zip(starting, answers, strict=True) if text == "held"]
            others = [text for text in answers if text != "held"]
            assert all(text.startswith("name: run is being run by PID ") for text in others), answers
            winner.go_on()
            assert winner.answer() == "ended"


def test_a_process_that_was_killed_here_is_in_nobodys_way(s3: Bucket) -> None:
    uri = s3.uri("x/_running.json")
    with holders(holder := Holder(uri)):
        holder.hold()
        holder.process.kill()
        holder.process.wait()
        assert objects(s3) == ["x/_running.json"]
        before = time.monotonic()
        with claimed(uri, "busy", remedy="wait"):
            assert time.monotonic() - before < claim.STALE_S
            assert json.loads(s3.client.get_object(Bucket=s3.bucket, Key="x/_running.json")["Body"].read())["pid"] == (
                os.getpid()
            )
    assert objects(s3) == []


def test_a_process_that_was_killed_elsewhere_is_taken_for_dead_when_it_has_been_silent(s3: Bucket) -> None:
    uri = s3.uri("x/_running.json")
    with holders(holder := Holder(uri, where="elsewhere")):
        holder.hold()
        holder.process.kill()
        holder.process.wait()
        before = time.monotonic()
        with claimed(uri, "busy", remedy="wait"):
            assert claim.STALE_S <= time.monotonic() - before < claim.STALE_S + 10
    assert objects(s3) == []


@pytest.mark.parametrize("interrupts", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_holder_that_was_taken_for_dead_is_stopped_when_it_comes_back(
    s3: Bucket, interrupts: signal.Handlers
) -> None:
    """Also one that a shell script has started in the background, which ignores interrupts."""
    uri = s3.uri("x/_running.json")
    with holders(holder := Holder(uri, where="elsewhere", before=lambda: signal.signal(signal.SIGINT, interrupts))):
        holder.hold()
        last = beat(s3)
        while beat(s3) == last:  # not in the middle of a write, which would come late
            pass
        holder.process.send_signal(signal.SIGSTOP)  # as a machine that is suspended
        with claimed(uri, "busy", remedy="wait"):
            holder.process.send_signal(signal.SIGCONT)
            assert re.fullmatch(
                rf"name: run is being run by PID {os.getpid()} of .+ too, which counted this process as dead; "
                "wait for it",
                holder.answer(),
            )
            assert holder.process.wait(30) == 0
            assert objects(s3) == ["x/_running.json"]  # of the successor, left alone
    assert objects(s3) == []


def test_whoever_waits_gets_the_claim_when_it_is_given_back(s3: Bucket) -> None:
    uri = s3.uri("x/_running.json")
    with holders(holder := Holder(uri, where="elsewhere")):
        holder.hold()
        later = threading.Timer(2.0, holder.go_on)
        later.start()
        before = time.monotonic()
        with claimed(uri, "busy", remedy="wait", wait_s=60.0):
            assert time.monotonic() - before >= 2.0
            assert holder.answer() == "ended"


def test_an_outage_of_the_store_ends_no_claim(faulty_s3: FaultyS3, s3: Bucket) -> None:
    uri = s3.uri("x/_running.json")
    with claimed(uri, "busy", remedy="wait"):
        faulty_s3.faults = Faults(expired=True)
        before = beat(s3)
        time.sleep(1.0)
        faulty_s3.faults = Faults()
        deadline = time.monotonic() + 60
        while beat(s3) <= before + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert objects(s3) == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": -1}', b"\xff"])
def test_what_is_no_claim_is_taken_over_after_the_same_silence(
    s3: Bucket, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "STALE_S", 1.0)
    s3.client.put_object(Bucket=s3.bucket, Key="x/_running.json", Body=content)
    before = time.monotonic()
    with claimed(s3.uri("x/_running.json"), "busy", remedy="wait"):
        assert time.monotonic() - before >= claim.STALE_S
        assert objects(s3) == ["x/_running.json"]
    assert objects(s3) == []
