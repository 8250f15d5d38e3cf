"""What the driver and the workers of a run tell each other, through one actor on the driver's node.

Reports go to the driver. So does a sign of life of each worker, which comes back with what the driver asks for: to save
and leave, or to write down where it is. Nobody waits for the other.
"""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bit_ray import log_lines

Phase = Literal["starting", "waiting for data", "computing", "saving", "done"]
_SECONDS_BETWEEN_SIGNS = 0.5
# What the one actor takes without a queue, a third of what it can on one busy core (benchmarks/control_plane.py).
_SIGNS_PER_SECOND = 400
_SECONDS_TO_BE_SILENT = 5.0  # at least, and three signs of life


def seconds_between_signs(num_workers: int) -> float:
    """Return how often each of so many workers gives a sign of life."""
    return max(_SECONDS_BETWEEN_SIGNS, num_workers / _SIGNS_PER_SECOND)


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of life of one worker."""

    rank: int
    node_id: str
    host: str
    """Address of its node."""
    step: int
    """Step that it is at."""
    phase: Phase
    since_s: float
    """Seconds in this step and phase, by the worker's clock."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the driver asks of the workers of one attempt."""

    leave: str = ""
    """Why to save and leave at the next step; empty: stay."""
    stacks: bool = False
    """Whether each worker writes down where it is."""
    recorded: int = 0
    """Step up to which the driver has recorded what was reported; no wish, but it comes with them."""


def slowest(signs: dict[int, tuple[Sign, float]]) -> str:
    """Name the worker that the others wait for."""
    silence = _silence(len(signs))
    rank, (sign, age) = most_behind_first(signs)[0]
    seconds = sign.since_s + age
    heard = f", not heard of for {age:.0f} s" if age >= silence else ""
    return f"worker {rank} on {sign.host} has been at step {sign.step:,}, {sign.phase}, for {seconds:.0f} s{heard}"


def most_behind_first(signs: dict[int, tuple[Sign, float]]) -> list[tuple[int, tuple[Sign, float]]]:
    """Order workers: one that is silent, else one behind, else one that does not compute, comes first.

    Last come those that are done, who give no signs any more.
    """
    silence = _silence(len(signs))

    def order(item: tuple[int, tuple[Sign, float]]) -> tuple[bool, bool, int, bool, float]:
        _, (sign, age) = item
        return sign.phase == "done", age < silence, sign.step, sign.phase == "computing", -sign.since_s

    return sorted(signs.items(), key=order)


def _silence(num_workers: int) -> float:
    """Seconds after which a worker counts as silent."""
    return max(_SECONDS_TO_BE_SILENT, 3 * seconds_between_signs(num_workers))


class Messages:
    """A handle on the actor, for the driver and every worker."""

    def __init__(self) -> None:
        """Start the actor, on this node, so that no other node's failure ends it."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_Messages).remote()

    def send(self, report: dict[str, Any]) -> ray.ObjectRef:
        """Pass a report to the driver."""
        return self._actor.send.remote(report)

    def take(self) -> list[dict[str, Any]]:
        """Return the reports since the last call, in order."""
        reports: list[dict[str, Any]] = ray.get(self._actor.take.remote())
        return reports

    def show(self, attempt: int, sign: Sign, stack: str = "") -> ray.ObjectRef:
        """Give a sign of life; the result is the driver's `Wishes`."""
        return self._actor.show.remote(attempt, sign, stack)

    def signs(self, attempt: int) -> tuple[dict[int, tuple[Sign, float]], dict[int, str]]:
        """Return by rank the newest sign of each worker with its age in seconds, and the stacks they wrote down."""
        found: tuple[dict[int, tuple[Sign, float]], dict[int, str]]
        found = ray.get(self._actor.signs.remote(attempt))
        return found

    def wish(self, attempt: int, wishes: Wishes) -> None:
        """Ask the workers of an attempt for something."""
        ray.get(self._actor.wish.remote(attempt, wishes))

    def end(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


class _Messages:
    """The actor."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._taken = self._recorded = 0
        self._attempt = 0
        self._wishes = Wishes()
        self._signs: dict[int, tuple[Sign, float]] = {}
        self._stacks: dict[int, str] = {}

    def send(self, report: dict[str, Any]) -> None:
        self._reports.append(report)

    def take(self) -> list[dict[str, Any]]:
        taken, self._reports = self._reports, []
        self._recorded = self._taken  # who asks for more has recorded what it got
        self._taken = max([self._taken, *(report["step"] for report in taken if "step" in report)])
        return taken

    def show(self, attempt: int, sign: Sign, stack: str) -> Wishes:
        if attempt == self._attempt:  # not a worker that was given up
            self._signs[sign.rank] = sign, time.monotonic()
            if stack:
                self._stacks[sign.rank] = stack
        if attempt != self._attempt:
            return Wishes(leave="another attempt has begun")
        return replace(self._wishes, recorded=self._recorded)

    def signs(self, attempt: int) -> tuple[dict[int, tuple[Sign, float]], dict[int, str]]:
        self._begin(attempt)
        now = time.monotonic()
        return {rank: (sign, now - at) for rank, (sign, at) in self._signs.items()}, self._stacks

    def wish(self, attempt: int, wishes: Wishes) -> None:
        self._begin(attempt)
        self._wishes = wishes

    def _begin(self, attempt: int) -> None:
        if attempt != self._attempt:
            self._attempt, self._wishes, self._signs, self._stacks = attempt, Wishes(), {}, {}


class SignsOfLife(threading.Thread):
    """A worker's side: shows every `seconds_between_signs` where the training is, and hears what the driver wishes.

    The training only sets attributes, so a step does not become slower, and a worker that hangs still shows where.
    """

    def __init__(
        self,
        messages: Messages,
        attempt: int,
        rank: int,
        num_workers: int,
        step: int,
        on_stall: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_stall`` is called once, in a thread of its own, when the driver asks for stacks."""
        super().__init__(name="signs", daemon=True)
        context = ray.get_runtime_context()
        self.leave = ""
        """Why the driver wants the workers to leave; empty: it does not."""
        self.recorded = 0
        """Step up to which the driver has recorded what was reported."""
        self._messages, self._attempt, self._on_stall = messages, attempt, on_stall
        self._seconds = seconds_between_signs(num_workers)
        self._next = time.monotonic() + self._seconds * rank / num_workers  # not all at once
        self._sign = Sign(
            rank=rank,
            node_id=context.get_node_id(),
            host=ray.util.get_node_ip_address(),
            step=step,
            phase="starting",
            since_s=0.0,
        )
        self._at: tuple[int, Phase, float] = (step, "starting", time.monotonic())
        self._ended = threading.Event()
        self._trained_by = threading.get_ident()

    def at(self, step: int, phase: Phase) -> None:
        """Say which step is reached, and what is done for it."""
        log_lines.about(step=step)
        self._at = step, phase, time.monotonic()

    def run(self) -> None:
        """Show signs until `end`."""
        stack, answer, stalled = "", None, False
        while not self._ended.wait(_SECONDS_BETWEEN_SIGNS):
            if answer is None:
                if time.monotonic() < self._next:
                    continue
                self._next = time.monotonic() + self._seconds - _SECONDS_BETWEEN_SIGNS
                answer, stack = self._messages.show(self._attempt, self._now(), stack), ""
            if not ray.wait([answer], timeout=0)[0]:
                continue
            try:
                wishes: Wishes = ray.get(answer)
            except ray.exceptions.RayError:
                return  # the driver is gone, and Ray ends this worker
            answer = None
            self.leave, self.recorded = self.leave or wishes.leave, wishes.recorded
            if wishes.stacks:
                frame = sys._current_frames().get(self._trained_by)
                stack = "".join(traceback.format_stack(frame))
                if not stalled:
                    stalled = True
                    threading.Thread(target=self._on_stall, name="stall", daemon=True).start()

    def _now(self) -> Sign:
        step, phase, since = self._at
        return replace(self._sign, step=step, phase=phase, since_s=time.monotonic() - since)

    def end(self) -> None:
        """Show where the training has ended, and no more."""
        self._ended.set()
        self._messages.show(self._attempt, self._now())
