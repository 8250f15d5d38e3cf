"""Progress display of a run: a bar on a terminal, the same data as lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# Printed text has users' names and numbers: `:m:` and `[x]` in it are not markup.
console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
_SECONDS_BETWEEN_LINES = 5.0


def print_table(title: str, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print a table; numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=bool(header))
    columns = header or ("",) * len(rows[0])
    for i, name in enumerate(columns):
        numeric = i > 0 and all(_is_number(row[i]) for row in rows)
        longest = max((len(word) for row in rows for word in row[i].split()), default=0)
        # Users copy names from tables: short ones are not wrapped.
        table.add_column(
            name, justify="right" if numeric else "left", overflow="fold", min_width=longest if longest <= 24 else None
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _is_number(text: str) -> bool:
    return bool(text) and text.replace(",", "").replace(" ", "").strip("%+-.±sBGKM").replace(".", "").isdigit()


@contextmanager
def track(
    title: str, total: int | None, unit: str, *, started: float | None = None, seconds_per_line: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Show how much of some work is done, its speed and the time left; call the yielded function on each advance.

    Args:
        title: The work.
        total: Amount of work; None: not known.
        unit: Unit of the amount.
        started: ``time.monotonic()`` when it began; None: now.
        seconds_per_line: Least time between two lines, except before the last one.
    """
    if sys.stdout.isatty():
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, redirect_stderr=sys.stderr.isatty()) as bar:
            task = bar.add_task(title, total=total, rate="")

            def advance(count: int) -> None:
                bar.advance(task, count)
                speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
                bar.update(task, rate=f"{speed:,.1f} {unit}/s" if speed else "")

            yield advance
        return
    started = time.monotonic() if started is None else started
    done, shown, line = 0, 0.0, started

    def count_up(count: int) -> None:
        nonlocal done, shown, line
        done += count
        share = done / total if total else 0.0
        if done == total or (share - shown >= 0.1 and time.monotonic() - line >= seconds_per_line):
            shown, line = share, time.monotonic()
            speed = done / max(time.monotonic() - started, 1e-9)
            left = f", {(total - done) / speed / 60:.1f} min left" if total else ""
            console.print(f"{title}: {done:,}/{total or '?'} {unit}, {speed:,.1f} {unit}/s{left}")

    yield count_up


@contextmanager
def follow(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show progress from the first report on, which gives the total."""
    started = time.monotonic()
    with ExitStack() as stack:
        advance: list[Callable[[int], None]] = []
        last = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal last
            if not advance:
                advance.append(
                    stack.enter_context(track(title, total, "images", started=started, seconds_per_line=1.0))
                )
            advance[0](done - last)
            last = done

        yield progress


class TrainingProgress:
    """Step, loss, rate, images per second, share of time waiting for data, time left."""

    def __init__(self, title: str):
        self.title = title
        self.next_line = 0.0
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                redirect_stderr=sys.stderr.isatty(),
            )
            self.task = self.bar.add_task(title, total=None, facts="starting workers")
            self.bar.start()
        else:
            console.print(f"{title}: starting workers")

    def update(self, metrics: dict[str, Any]) -> None:
        """Show one report of the workers."""
        step, total = metrics["step"], metrics["num_steps"]
        speed = metrics["speed/images_per_s"]
        per_step = metrics["train/images_seen"] / step
        facts = (
            f"loss {metrics['train/loss']:.4f}  lr {metrics['train/lr']:.2g}  {speed:,.0f} images/s  "
            f"wait {metrics['speed/wait_share']:.0%}"
        )
        if "data/cache_hit_share" in metrics:
            facts += f"  cache {metrics['data/cache_hit_share']:.0%}"
        if metrics["data/bad_images"]:
            facts += f"  bad {metrics['data/bad_images']:,.0f}"
        if self.bar is not None:
            self.bar.update(self.task, total=total, completed=step, facts=facts)
        elif step == total or time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            left = (total - step) * per_step / max(speed, 1e-9)
            console.print(f"{self.title}: step {step}/{total}  {facts}  {left / 60:.1f} min left")

    def close(self) -> None:
        """Stop the bar, and leave its last state on the screen."""
        if self.bar is not None:
            self.bar.stop()
