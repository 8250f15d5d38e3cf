"""The worker groups of a run, one after the other: how many workers each has, why it ends, what it cost.

A group has a fixed number of workers. To change the number, or to leave a node that is being taken away, the workers
are asked to save and return, all at the same step, and the next group starts from there: no step is lost. Only a worker
that dies without warning costs the steps since the last checkpoint. Order, batch and schedule depend on the step alone,
so what is learned stays the same.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import ray
import ray.train

from bit_ray import log_lines, store
from bit_ray.cluster.seats import free_group, nodes_alive, nodes_leaving
from bit_ray.cluster.slots import Workers
from bit_ray.config import to_dict
from bit_ray.errors import ModelError, StoppedError, StoreError, root_cause
from bit_ray.progress import console
from bit_ray.run_folder import TRAINING_FILE
from bit_ray.run_records import Attempt, AttemptRecord, LeftOut, Now, WorkerNow
from bit_ray.tracking.registry import registered_packages
from bit_ray.training.checkpoint.state import CheckpointRecord
from bit_ray.training.goodput import (
    Goodput,
    as_duration,
    furthest_and_last,
    goodput,
    lost_steps,
    planned_time,
    with_report,
)
from bit_ray.training.group import Fit, found_no_room, trainer
from bit_ray.training.healing import step_to_go_back_to
from bit_ray.training.messages import Sign, Wishes, most_behind_first, slowest
from bit_ray.training.parts import count_parameters
from bit_ray.training.reports import Listener
from bit_ray.training.room import Growth, wait_for_room
from bit_ray.training.shares import share_out
from bit_ray.training.signals import Signals
from bit_ray.training.stacks import StackFile
from bit_ray.training.worker import WorkerConfig

log = logging.getLogger(__name__)
T = TypeVar("T")

_SECONDS_BETWEEN_LOOKS = 0.25
_SECONDS_BETWEEN_QUESTIONS = 1.0
_SECONDS_TO_START = 600.0
# Weight, momentum and, where weight decay pulls to it, initial weight, at 5 MB/s.
_SECONDS_TO_SAVE_A_PARAMETER = 12 / 5e6


class Attempts:
    """Carries out a run on a cluster that may grow, shrink and fail."""

    def __init__(
        self, name: str, worker: WorkerConfig, workers: Workers, storage: str, listener: Listener, furthest: int
    ) -> None:
        """Prepare.

        Args:
            name: Of the run, in what is printed.
            worker: What every worker gets.
            workers: Least and most workers.
            storage: URI that every node reaches.
            listener: Hears of the workers' reports.
            furthest: Steps that are known to have been taken before.
        """
        self._name, self._worker, self._workers = name, worker, workers
        self._storage, self._listener, self._messages = storage, listener, worker.messages
        self._runtime, self._folder = worker.runtime, worker.folder
        self._failures: list[set[str]] = []  # the nodes there were at the start of each failed attempt
        self._signals = Signals()
        self._done = list(self._folder.attempts())
        self._furthest, self._reached = furthest_and_last(self._done, furthest)
        self._now: Attempt | None = None
        self._planned = store.exists(self._folder.planned_file)
        self._signs: dict[int, tuple[Sign, float]] = {}
        self._progress_at = self._began = self._saved_at = time.monotonic()
        plan = worker.plan
        _, num_parameters = count_parameters(plan.model, plan.num_classes, plan.train)
        self._seconds_to_save = _SECONDS_TO_SAVE_A_PARAMETER * num_parameters

    def run(self) -> Goodput:
        """Train to the last step; return where the time went.

        Raises:
            StoppedError: The process was asked to end; the workers have saved.
            BitRayError: Anything the user can fix.
        """
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # `_watch` looks for nodes that leave
        os.environ["RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"] = "0"  # it would configure this process's logging
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(int(self._runtime.give_up_after_s)))
        why = "the run was started again" if self._done else "the run begins"
        with self._signals.noted():
            free_group(self._patiently(self._group_id))  # of an attempt that was killed
            while (step := self._patiently(self._newest_checkpoint)) < self._worker.plan.schedule.num_steps:
                why = self._attempt(step, why)
        return goodput(self._done)

    def _newest_checkpoint(self) -> int:
        """Return its step, and record what was reported until then and has reached no driver."""
        if step := self._folder.newest_checkpoint():
            record = store.join(self._folder.checkpoint(step), TRAINING_FILE)
            self._listener.recover(store.read_record(CheckpointRecord, record).progress.unrecorded)
        return step

    def _attempt(self, first_step: int, why: str) -> str:
        """Train with one group of workers; return why another one is needed."""
        self._began = self._progress_at = began = time.monotonic()
        plan = self._worker.plan
        num_workers = wait_for_room(
            self._name, self._workers, self._runtime.grow_after_s, why, partial(self._signals.end_if_told, saved=True)
        )
        shares, micro = share_out(plan, self._runtime, num_workers)
        attempt = Attempt(
            number=len(self._done) + 1,
            why=why,
            num_workers=num_workers,
            shares=tuple(map(len, shares)),
            micro_batch_size=micro,
            first_step=first_step,
            steps_lost=max(0, self._reached - first_step),
            last_step=first_step,
            waited_s=time.monotonic() - began,
        )
        log_lines.about(attempt=attempt.number, step=first_step)
        self._listener.last = {}  # of another attempt
        self._show(attempt)
        self._now = attempt
        self._patiently(self.write)
        nodes = nodes_alive()
        left_out = self._patiently(self._folder.left_out)
        worker = replace(self._worker, attempt=attempt.number, first_step=first_step, left_out=left_out)
        storage = store.join(self._storage, self._name)
        fit = Fit(worker, trainer(num_workers, self._workers, storage, self._runtime.give_up_after_s))
        fit.start()
        try:
            first_seen, asked, seen = self._watch(fit, attempt, began)
            free_group(fit.group_id)  # Ray keeps the room of a group whose workers could not connect
            self._listener.settle()
        except KeyboardInterrupt:  # StoppedError, too
            fit.end()
            raise
        finally:
            attempt = self._account(attempt, self._furthest)
            self._now, self._signs = None, {}
            self._done.append(replace(attempt, ended="failed", wall_s=time.monotonic() - began))
        saved = self._patiently(self._folder.newest_checkpoint)
        ended: Literal["finished", "left", "failed"]
        ended = "finished" if saved >= plan.schedule.num_steps else "left" if fit.error is None else "failed"
        attempt = replace(
            attempt,
            ended=ended,
            last_step=max(attempt.last_step, seen, saved),
            starting_s=max(0.0, first_seen - began - attempt.waited_s) if first_seen else 0.0,
            wall_s=time.monotonic() - began,
        )
        self._done[-1] = attempt
        self._reached = attempt.last_step
        self._furthest = max(self._furthest, self._reached)
        self._patiently(self.write)
        if self._signals.first and ended != "finished":
            raise StoppedError(
                self._signals.first, f"{self._name}: saved after step {saved:,}; start it again to go on"
            )
        blamed, self._listener.go_back = self._listener.go_back, None
        if fit.error is not None:
            return self._judge(fit.error, fit.given_up, nodes)
        return asked if blamed is None else self._go_back(blamed)

    def _patiently(self, use: Callable[[], T]) -> T:
        """Use the store, again and again while it cannot be reached, for as long as a read of training data."""
        began, told = time.monotonic(), False
        while True:
            try:
                return use()
            except StoreError as error:
                if not error.passing or time.monotonic() - began > store.PATIENCE_S:
                    raise
                if not told:
                    console.print(f"{self._name}: waiting for the store, for {store.PATIENCE_S:g} s: {error}")
                    told = True
            self._signals.end_if_told(saved=True)
            time.sleep(1.0)

    def _watch(self, fit: Fit, attempt: Attempt, began: float) -> tuple[float, str, int]:
        """Wait for the group's end, and ask it to leave where that is better.

        Args:
            fit: The group.
            attempt: What is known of it.
            began: When it began, by the monotonic clock.

        Returns:
            When the first step began (0 for never), why it was asked to leave, and the furthest step that was seen.
        """
        runtime, number = self._runtime, attempt.number
        ended, asked, first_seen, seen = False, "", 0.0, attempt.first_step
        progress_at, next_question = time.monotonic(), 0.0
        stalled, stack_file = False, StackFile(self._folder.stacks(number))
        growth = Growth(self._workers, attempt.num_workers, runtime.grow_after_s)
        try:
            while not ended:
                ended = fit.wait(_SECONDS_BETWEEN_LOOKS)
                now = time.monotonic()
                signs, stacks = self._messages.signs(number)
                self._signs, self._progress_at = signs, progress_at
                reached = max((sign.step for sign, _ in signs.values()), default=0)
                begun = bool(signs) and all(sign.phase != "starting" for sign, _ in signs.values())
                if begun and not first_seen:
                    first_seen = progress_at = now
                if reached > seen:
                    seen, progress_at = reached, now
                if self._signals.end_if_told(saved=not begun) and not asked:
                    asked = "the program was asked to end"
                    console.print(f"{self._name}: saving at the next step; once more ends it at once")
                    self._messages.wish(number, Wishes(leave=asked))
                silent_s = now - progress_at
                # The first step waits for processes, weights and data.
                start = _SECONDS_TO_START if seen == attempt.first_step else 0.0
                # The last checkpoint is waited for.
                saving = self._seconds_to_save if any(sign.phase == "saving" for sign, _ in signs.values()) else 0.0
                if silent_s >= max(runtime.give_up_after_s + saving, start):
                    fit.given_up = f"no step for {silent_s:.0f} s" + (f", {slowest(signs)}" if signs else "")
                    console.print(f"{self._name}: no step for {silent_s:.0f} s; ending the workers")
                    free_group(fit.group_id)
                    progress_at = now
                elif begun and silent_s >= max(runtime.stalled_after_s, start / 4) and not stalled:
                    stalled = True
                    self._messages.wish(number, Wishes(leave=asked, stacks=True))
                    places = f"{stack_file.uri}, their collectives next to it"
                    console.print(f"{self._name}: {slowest(signs)}; stacks of all workers: {places}")
                stack_file.offer(signs, stacks)
                if not begun or asked or now < next_question:
                    continue
                next_question = now + _SECONDS_BETWEEN_QUESTIONS
                left = self._worker.plan.schedule.num_steps - seen
                asked = self._leaving_node(signs) or growth.reason(
                    left, (now - first_seen) / max(1, seen - attempt.first_step), first_seen - fit.began
                )
                if asked:
                    self._messages.wish(number, Wishes(leave=asked))
                self._plan_time(attempt, now - began)
        finally:
            growth.end()
        return first_seen, asked, seen

    def _plan_time(self, attempt: Attempt, wall_s: float) -> None:
        """Record once how long the run will take: from the first steps of its first attempt, unless a plan was made."""
        if attempt.number > 1 or self._planned:
            return
        steps = self._worker.plan.schedule.num_steps
        planned = planned_time(self._listener.times_of(1), steps, wall_s - attempt.waited_s)
        if planned is not None:
            self._planned = True
            try:
                store.write_json(self._folder.planned_file, to_dict(planned))
            except StoreError as error:
                log.warning("%s: %s; the training continues", self._name, error)
            console.print(f"{self._name}: will take {as_duration(planned.seconds)}, by {planned.source}")

    def _leaving_node(self, signs: dict[int, tuple[Sign, float]]) -> str:
        leaving = nodes_leaving()
        for sign, _ in signs.values():
            if sign.node_id in leaving:
                seconds = leaving[sign.node_id]
                return f"node {sign.host} is being taken away" + (f" in {seconds:.0f} s" if seconds < 1e6 else "")
        return ""

    def _judge(self, error: BaseException, given_up: str, nodes: set[str]) -> str:
        """Return why another attempt is made after a failed one, or one that was given up for a reason.

        Raises:
            BitRayError: The user must do something first, or it has failed too often.
        """
        if not isinstance(error, ray.train.TrainingFailedError | StoreError):
            raise error
        # What the user must fix would only fail again; Ray Train's own retries cannot tell the two apart.
        cause = root_cause(error)
        away = isinstance(cause, StoreError) and cause.passing
        if cause is not None and not away:
            raise cause from None
        if found_no_room(error):
            return "the room was taken by others"
        self._failures.append(nodes)
        # One that has lost a node by now does not count.
        count = sum(nodes <= nodes_alive() for nodes in self._failures)
        lost = not nodes <= nodes_alive()
        if count > self._runtime.max_failures:
            if cause is not None:
                raise cause from None
            last = given_up or (str(error).strip().splitlines() or ["unknown"])[-1]
            raise ModelError(
                f"{self._name}: workers failed {count} times (last: {last}); "
                "read the worker logs; start the run again to continue from its last checkpoint"
            ) from error
        why = "a node was lost" if lost else "the store was away" if away else "a worker failed"
        console.print(f"{self._name}: workers failed; starting them again from the last checkpoint ({why})")
        return why

    def _go_back(self, blamed: LeftOut) -> str:
        """Delete the checkpoints that a batch has been learned into, or may have been; return why.

        Raises:
            ModelError: A registered version refers to one of them.
        """
        kept = self._folder.checkpoints(TRAINING_FILE)
        back_to = step_to_go_back_to(kept, blamed.step)
        tracked = self._listener.tracked
        registered = registered_packages(tracked.tracking_uri, tracked.run_id)
        later = [step for step in kept if step > back_to]
        for step in later:
            if self._folder.checkpoint(step) in registered:
                raise ModelError(
                    f"{self._name}: step {blamed.step} broke the weights ({blamed.why}), but a registered version "
                    f"refers to {self._folder.checkpoint(step)}, behind which the run would go back; delete that "
                    "version, and start the run again"
                )
        for step in reversed(later):  # killed in between, the workers find the same again
            self._folder.delete_checkpoint(step)
        self._folder.leave_out(blamed)
        self._listener.on_left_out(blamed)
        return f"going back to leave out step {blamed.step}"

    def _account(self, attempt: Attempt, furthest: int) -> Attempt:
        """Return the attempt with the seconds of its reports."""
        for time_of in self._listener.times_of(attempt.number):
            attempt = with_report(attempt, furthest, *time_of)
        return attempt

    def record(self) -> dict[str, Any]:
        """Return the attempts so far as plain data, an `AttemptRecord`."""
        return to_dict(AttemptRecord(attempts=self._so_far()))

    def _so_far(self) -> tuple[Attempt, ...]:
        done, now = tuple(self._done), self._now
        if now is None:
            return done
        return *done, replace(self._account(now, self._furthest), wall_s=time.monotonic() - self._began)

    def now(self) -> Now:
        """Return where the run is; for any thread."""
        attempts, at = self._so_far(), time.monotonic()
        running = self._now
        report = self._listener.last
        step = max(self._furthest if running is None else running.first_step, int(report.get("step", 0)))
        return Now(
            unix_s=time.time(),
            step=step,
            num_steps=self._worker.plan.schedule.num_steps,
            attempt=len(attempts),
            num_workers=0 if running is None else running.num_workers,
            num_workers_wanted=self._workers.most,
            goodput=goodput(attempts).share,
            still_s=at - self._progress_at,
            checkpoint_age_s=at - self._saved_at,
            workers=tuple(
                WorkerNow(rank=rank, host=sign.host, step=sign.step, phase=sign.phase, seconds=sign.since_s + age)
                for rank, (sign, age) in most_behind_first(self._signs)
            ),
            metrics={name: float(value) for name, value in report.items() if "/" in name},
        )

    def saved(self) -> None:
        """Note that a checkpoint is complete."""
        self._saved_at = time.monotonic()

    def write(self) -> None:
        """Record how far the run has come, for a driver that goes on after this one was killed."""
        store.write_json(self._folder.attempts_file, self.record())

    def _group_id(self) -> str:
        return store.read_bytes(self._folder.group, 100).decode() if store.exists(self._folder.group) else ""

    def _show(self, attempt: Attempt) -> None:
        if attempt.number == 1 and self._workers.least == self._workers.most:
            return
        least, most = min(attempt.shares), max(attempt.shares)
        shares = f"{least}" if least == most else f"{least} or {most}"
        lost = lost_steps(attempt.steps_lost, self._done[-1] if self._done else None)
        plural = "" if attempt.num_workers == 1 else "s"
        console.print(
            f"{self._name}: attempt {attempt.number} from step {attempt.first_step:,}: {attempt.num_workers} worker"
            f"{plural} x {shares} images, micro-batches of at most {attempt.micro_batch_size}; {lost} ({attempt.why})"
        )
