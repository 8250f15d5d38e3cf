"""``bit-ray status``: where runs stand, by their folders, and what the cluster says that they run on."""

import time
from typing import TYPE_CHECKING

from bit_ray.progress import console, print_table
from bit_ray.training.config import StatusConfig

if TYPE_CHECKING:
    from bit_ray.run_records import Attempt, Now

_SECONDS_TO_BE_SILENT = 60.0  # a driver says every 15 s where it is
_NUM_JOBS = 10


def status(config: StatusConfig) -> None:
    """Print where all runs stand, or one with its attempts; and the cluster's jobs and idle nodes, where it answers."""
    from bit_ray.cluster.dashboard import dashboard_address

    address = dashboard_address(config.address)
    if config.run:
        _print_run(config)
    else:
        _print_runs(config, needed=not address)
    if address:
        _print_cluster(address, config)


def _print_run(config: StatusConfig) -> None:
    from bit_ray.errors import BitRayError
    from bit_ray.training.goodput import goodput
    from bit_ray.training.status import run_status

    try:
        found = run_status(config.storage, config.run)
    except BitRayError as error:
        raise error.about("run") from None
    console.print(
        f"{found.name}: {found.state}, {found.kind} of {found.model}, step {found.step:,} of {found.num_steps:,}, "
        f"saved after {found.saved_step:,}" + (f", by {found.holder}" if found.holder else "")
    )
    if found.now is not None and found.state == "running":
        for line in _lines(found.now):
            console.print(line)
    if found.attempts:
        header = ("attempt", "workers", "steps", "lost", "starting s", "all s", "ended", "why it began")
        print_table("Attempts", [_attempt(attempt) for attempt in found.attempts], header)
        console.print(str(goodput(found.attempts)))
    if found.left_out:
        batches = [(f"{batch.step:,}", f"{len(batch.images):,}", batch.why) for batch in found.left_out]
        print_table("Left out", batches, ("step", "images", "why"))


def _lines(now: "Now") -> list[str]:
    """Return the newest record of its driver in words, a line for each part."""
    age, metrics = max(0.0, time.time() - now.unix_s), now.metrics
    known = (
        ("loss", "train/loss", "{:.4f}"),
        ("images/s", "speed/images_per_s", "{:,.0f}"),
        ("wait", "speed/wait_share", "{:.0%}"),
        ("MFU", "speed/mfu", "{:.1%}"),
        ("bad images", "data/bad_images", "{:,.0f}"),
    )
    facts = [f"{label} {form.format(metrics[name])}" for label, name, form in known if name in metrics]
    lines = [
        f"{age:,.0f} s ago: attempt {now.attempt}, {now.num_workers} of {now.num_workers_wanted} workers, "
        + ", ".join([*facts, f"last step {now.still_s:,.0f} s before", f"goodput {now.goodput:.0%}"])
    ]
    if now.workers:
        slowest = now.workers[0]
        lines.append(
            f"slowest: worker {slowest.rank} on {slowest.host}, at step {slowest.step:,}, {slowest.phase}, for "
            f"{slowest.seconds:,.1f} s"
        )
    if age > _SECONDS_TO_BE_SILENT:
        lines.append("warning: its driver does not say any more where it is; look at its log")
    return lines


def _print_runs(config: StatusConfig, *, needed: bool) -> None:
    from bit_ray.errors import ConfigError
    from bit_ray.training.status import run_statuses

    try:
        all_runs, damaged = run_statuses(config.storage)
    except ConfigError as error:
        if needed:
            raise
        console.print(f"no runs: {error}")
        return
    rows = [
        (
            run.name,
            run.state,
            run.kind,
            run.model,
            f"{run.step:,}/{run.num_steps:,}",
            f"{run.saved_step:,}",
            str(len(run.attempts)) if run.attempts else "",
            f"{run.goodput:.0%}" if run.attempts else "",
        )
        for run in all_runs
    ]
    if rows:
        columns = ("run", "state", "kind", "model", "step", "saved", "attempts", "goodput")
        print_table(f"Runs in {config.storage}", rows, columns)
    else:
        console.print(f"{config.storage}: no runs")
    for line in damaged:
        console.print(f"warning: {line}")


def _print_cluster(address: str, config: StatusConfig) -> None:
    from bit_ray.cluster.dashboard import NoAnswerError, jobs, nodes
    from bit_ray.training.goodput import as_duration

    try:
        submitted, alive = jobs(address), nodes(address)
    except NoAnswerError as error:
        console.print(f"cluster: {error}; what is above is of the storage alone")
        return
    shown = [job for job in submitted if config.run in ("", job.run)]
    if shown:
        now = time.time()
        rows = [
            (
                job.id,
                job.state,
                job.run,
                f"{((job.ended_s or now) - job.started_s) / 3600:,.2f}" if job.started_s else "",
            )
            for job in shown[:_NUM_JOBS]
        ]
        more = f", the newest {_NUM_JOBS} of {len(shown)}" if len(shown) > _NUM_JOBS else ""
        print_table(f"Jobs of {address}{more}", rows, ("job", "state", "run", "hours"))
    cpus, gpus = (sum(getattr(node, kind) for node in alive) for kind in ("num_cpus", "num_gpus"))
    idle = [node for node in alive if node.is_idle]
    console.print(f"cluster: {len(alive)} nodes, {cpus:,} CPUs, {gpus:,} GPUs; {len(idle)} idle")
    for node in idle:
        for_long = f", for {as_duration(time.time() - node.idle_since_s)}" if node.idle_since_s else ""
        console.print(
            f"idle: {node.address}{' (the head)' if node.is_head else ''}, {node.num_cpus} CPUs, {node.num_gpus} "
            f"GPUs{for_long}"
        )
    if idle and config.node_price:
        console.print(f"idle nodes cost {config.node_price * len(idle):,.2f} an hour")


def _attempt(attempt: "Attempt") -> tuple[str, ...]:
    return (
        str(attempt.number),
        str(attempt.num_workers),
        f"{attempt.first_step:,} to {attempt.last_step:,}",
        f"{attempt.steps_lost:,}",
        f"{attempt.starting_s:,.0f}",
        f"{attempt.wall_s:,.0f}",
        attempt.ended,
        attempt.why,
    )
