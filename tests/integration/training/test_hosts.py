"""A run on several hosts whose network and machines fail: a head, three trainers, a store and a tracker.

One story: a run takes two of the three trainers. A link becomes slow, and loses packets; the link between the two is
cut; a host loses its network; one is killed while workers start on it. With ``--all-faults`` one hangs, the program is
killed, and the head is killed, and comes back. Another run meets links that stay cut, and a store that stays away.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from glyph_runs import run_config, trained_here, write_glyphs
from host_cluster import WORKER, HostCluster, Program

from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.run_folder import Attempt
from bit_ray.tracking.config import TrackingConfig
from bit_ray.training.config import PretrainConfig
from bit_ray.training.pretrain import pretrain_plan

pytestmark = [pytest.mark.cluster, pytest.mark.hosts, pytest.mark.timeout(900)]

# As a user starts it.
COMMAND = """
import sys
from bit_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "--config", sys.argv[1]]))
"""
STEPS, STALLED_S, GIVE_UP_S, STORE_PATIENCE_S = 200, 5.0, 12.0, 10.0
# From the fault to the first steps after it, where Ray needs at most 10 s to give up a silent host: that, and a start
# on cores that other tests use, too.
BOUND_S = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostCluster]:
    folder = tmp_path_factory.mktemp("hosts")
    with HostCluster(folder, "a", "b", "c", number=0, store_patience_s=STORE_PATIENCE_S) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def reached(cluster: HostCluster) -> Iterator[None]:
    """The store of the cluster is that of this process, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.bucket.environment.items():
            patch.setenv(name, value)
        yield


@dataclass(frozen=True)
class Story:
    """What was seen of the run."""

    config: PretrainConfig
    attempts: tuple[Attempt, ...]
    log: str
    took_s: dict[str, float]
    """Seconds from each fault to the first steps after it."""
    attempts_on_a_poor_link: int
    """How many there had been when the link was as it should be again."""
    trained_on: dict[int, list[str]]
    """The hosts of each group of workers that took steps."""
    history: list[tuple[int, float]]
    """The losses that the tracker has."""
    status: int


@pytest.fixture(scope="module")
def story(cluster: HostCluster, reached: None, request: pytest.FixtureRequest) -> Story:
    shards = write_glyphs(cluster.bucket.uri("shards"))
    runtime = {"num_workers": 2, "device": "cpu", "checkpoint_every_s": 1.0}
    runtime |= {"stalled_after_s": STALLED_S, "give_up_after_s": GIVE_UP_S}
    config = replace(
        run_config(cluster.bucket.uri("runs"), "far", shards, STEPS, base_lr_per_256=0.004, **runtime),
        tracking=TrackingConfig(uri=cluster.mlflow.uri),
    )
    run = Program(cluster, config)
    took_s: dict[str, float] = {}
    trained_on: dict[int, list[str]] = {}

    def workers(*but: str) -> dict[int, str]:
        """Return the process ids of workers, with their hosts."""
        return {pid: name for name in cluster.trainers if name not in but for pid in cluster[name].running(WORKER)}

    def goes_on_after(fault: str, group: int, *gone: str) -> list[str]:
        """Wait until the group of this number has taken some steps, and return its hosts."""
        took_s[fault] = run.wait(lambda: run.trains(group), BOUND_S, fault)
        trained_on[group] = list(workers(*gone).values())
        return trained_on[group]

    run.start()
    first, second = goes_on_after("nothing", 1)
    for poor in (cluster[second].slow("8mbit"), cluster[second].lossy(0.05)):
        with poor:
            before = run.reached()
            run.wait(lambda: run.reached() >= before + 2, BOUND_S, "a poor link")  # noqa: B023  # called here only
    attempts_on_a_poor_link = len(run.attempts())

    with cluster.hosts.apart(first, second):
        run.wait(lambda: "ending the workers" in run.log or "workers failed" in run.log, BOUND_S, "a cut link")
    _, lost = goes_on_after("link cut", 2)

    before_it = workers()
    cluster[lost].cut_off()
    # One of the hosts on which workers start now is killed.
    run.wait(lambda: workers(lost).keys() - before_it, BOUND_S, "a host cut off")
    killed = next(name for pid, name in workers(lost).items() if pid not in before_it)
    cluster[killed].kill()
    cluster[lost].reconnect()
    cluster.wait(lambda: not cluster[lost].pids(), 120, "the end of Ray on a host that was given up")
    cluster.start(lost, killed)
    halted, _ = goes_on_after("host killed", 4)

    assert run.process is not None
    if request.config.getoption("all_faults"):
        cluster[halted].halt()
        goes_on_after("host halted", 5, halted)
        cluster[halted].go_on()
        cluster.wait(lambda: not cluster[halted].pids(), 120, "the end of Ray on a host that was given up")
        cluster.start(halted)

        run.process.kill()
        run.process.wait()
        run.start()
        goes_on_after("program killed", 6)

        for name in ("head", *cluster.trainers):  # those without a head would take a minute to end
            cluster[name].kill()
        run.process.wait()
        cluster.start_head()
        cluster.wait(lambda: cluster.is_up("head"), 120, "the head")
        cluster.start(*cluster.trainers)
        cluster.wait(lambda: all(map(cluster.is_up, cluster.trainers)), 120, "all nodes")
        run.start()
        goes_on_after("head killed", 7)
    run.wait(lambda: run.process.poll() is not None, 200, "the end")

    return Story(
        config,
        run.attempts(),
        run.log,
        took_s,
        attempts_on_a_poor_link,
        trained_on,
        cluster.losses("far"),
        run.process.returncode,
    )


def test_the_run_goes_on_on_the_hosts_that_are_left(story: Story, request: pytest.FixtureRequest) -> None:
    num = len(story.attempts)
    assert num == (7 if request.config.getoption("all_faults") else 4)
    assert [attempt.num_workers for attempt in story.attempts] == [2] * num
    ends = ["failed"] * 4 + ["running"] * 2
    assert [attempt.ended for attempt in story.attempts] == [*ends[: num - 1], "finished"]
    lost, again = "a node was lost", "the run was started again"
    whys = [attempt.why for attempt in story.attempts]
    assert whys[:3] == ["the run begins", "a worker failed", lost]
    assert whys[3] in (lost, "a worker failed")  # that a node goes is known after that a worker does
    assert whys[4:] == [lost, again, again][: num - 4]
    assert all(len(set(hosts)) == 2 for hosts in story.trained_on.values())
    assert story.status == 0
    print(", ".join(f"{fault}: {seconds:.0f} s" for fault, seconds in story.took_s.items()))


def test_each_step_is_learned_once_and_as_one_worker_alone_does(story: Story, reached: None, ray_local: None) -> None:
    shards = story.config.shards
    expected, _ = trained_here(pretrain_plan(story.config, read_manifest(shards)), shards)
    assert [step for step, _ in story.history] == list(range(1, STEPS + 1))
    apart = {step: abs(loss / expected[step] - 1) for step, loss in story.history}
    # Two workers add up in another order than one, and training makes more of the last bit with every step.
    for until, bound in ((2, 1e-6), (30, 1e-5), (STEPS + 1, 5e-3)):
        assert max(apart[step] for step in range(1, until)) < bound


def test_a_link_that_is_slow_or_loses_packets_only_slows(story: Story) -> None:
    assert story.attempts_on_a_poor_link == 1


def test_a_worker_behind_a_cut_link_is_named_and_ended(story: Story) -> None:
    before = story.log[: story.log.index("far: attempt 2") if "far: attempt 2" in story.log else None]
    assert re.search(
        r"far: worker [01] on 10\.77\.\d+\.\d+ has been at step \d+, [a-z ]+, for \d+ s; stacks of ", before
    )


def test_what_stays_away_ends_the_run_with_one_line_and_another_start_goes_on(
    cluster: HostCluster, story: Story, reached: None, ray_local: None
) -> None:
    """Links between all trainers, and then the store."""
    far, few = story.config, 60
    config = run_config(
        far.storage, "cut", far.shards, few, base_lr_per_256=0.004, **to_dict(replace(far.runtime, max_failures=1))
    )
    run = Program(cluster, replace(config, tracking=far.tracking), COMMAND)

    def start(group: int) -> None:
        run.start()
        run.wait(lambda: run.trains(group), BOUND_S, "the first steps")

    def error(seconds: float) -> str:
        """Wait for the end, and return the line with which it ends."""
        assert run.process is not None
        before = len(run.log)
        took_s = run.wait(lambda: run.process.poll() is not None, seconds, "the end")
        [line] = [line for line in run.log[before:].splitlines() if line.startswith(("error: ", "Traceback"))]
        assert run.process.returncode == 2
        print(f"ended after {took_s:.0f} s: {line}")
        return line

    start(1)
    with cluster.hosts.apart(*cluster.trainers):
        # The first group is given up; the process group of the second does not come to be.
        line = error(2 * GIVE_UP_S + BOUND_S)
    assert line.startswith("error: cut: workers failed 2 times (last: "), line
    assert [attempt.ended for attempt in run.attempts()] == ["failed"] * 2
    assert run.run.newest_checkpoint() >= run.attempts()[-1].first_step > 0

    start(3)
    cluster["store"].cut_off()
    line = error(2 * STORE_PATIENCE_S + BOUND_S)
    cluster["store"].reconnect()
    assert line.startswith("error: s3://hosts/"), line
    assert run.run.newest_checkpoint() > run.attempts()[2].first_step

    run.start()
    run.wait(lambda: run.process.poll() is not None, BOUND_S, "the end")
    assert run.process.returncode == 0
    losses = cluster.losses("cut")
    assert [step for step, _ in losses] == list(range(1, few + 1))
    expected, _ = trained_here(pretrain_plan(config, read_manifest(config.shards)), config.shards)
    assert max(abs(loss / expected[step] - 1) for step, loss in losses) < 5e-3
