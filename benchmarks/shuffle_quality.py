"""How well the two-level shuffle mixes a set that is sorted by class, against memory and read amplification.

python benchmarks/shuffle_quality.py

Draws docs/shuffle.png and prints its numbers as a Markdown table; no image is read, because the order is a pure
function (`bit_ray.data.stream.order`). The set is the worst case, ILSVRC-2012 with one class after the other;
`bit-ray shards write` mixes its source, so that sets of its making are far from it.

- *classes*: distinct classes in a batch of 1,024, mean over batches; a full shuffle gives 641 of the 1,000.
- *chi-square*: Pearson's statistic of a batch's class histogram over that of a full shuffle; 1: as good, 4: the batch
  says as much about the set as a quarter of its images drawn independently. *predicted* is what the order's rules give:
  1 + (n - 1) (g - 1) / (W - 1) for n images per lane and batch, row groups of g and windows of W > g images.
- *reads*: bytes that workers read over the bytes of the set where each worker has a lane: a row group that the edge of
  a window cuts is read twice. Workers that share a lane each read all of it. A node's cache takes both away.
- *memory*: the encoded images of all lanes' windows, at 110 kB each, over all nodes together.

With the default window of 512 images in each of 8 lanes:

| row group | classes | chi-square | predicted | reads |
| ---: | ---: | ---: | ---: | ---: |
| 16 | 229 | 4.67 | 4.73 | 1.03 |
| 64 | 72 | 15.84 | 16.66 | 1.13 |
| 256 | 27 | 52.21 | 64.38 | 1.50 |
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bit_ray.data.stream.order import Order
from bit_ray.data.stream.settings import Shuffle

NUM_EXAMPLES, NUM_CLASSES, SHARD_EXAMPLES = 1_281_167, 1000, 4100
BATCH = 1024
NUM_BATCHES = 24
IMAGE_BYTES = 110e3
GROUP_SIZES = (16, 64, 256)
LANES = (8, 64)
WINDOWED = tuple(2**k for k in range(10, 20))  # images in the windows of all lanes together
DEFAULT = (64, Shuffle().num_lanes, Shuffle().num_lanes * Shuffle().lane_window)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "shuffle.png"

_INK, _GRAY, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_COLORS = dict(zip(GROUP_SIZES, ("#2f855a", "#0b6e99", "#d9730d"), strict=True))
_LINES = dict(zip(LANES, (("-", "o"), ((0, (2, 1.2)), "^")), strict=True))


@dataclass(frozen=True)
class Measured:
    """One setting and what it gives."""

    group_size: int
    num_lanes: int
    windowed: int
    classes: float
    chi_square: float
    predicted: float
    reads: float

    @property
    def window(self) -> int:
        """Images of a lane's window."""
        return self.windowed // self.num_lanes


def measure(group_size: int, num_lanes: int, windowed: int) -> Measured:
    window = windowed // num_lanes
    whole, rest = divmod(NUM_EXAMPLES, SHARD_EXAMPLES)
    order = Order(
        shard_sizes=[SHARD_EXAMPLES] * whole + [rest],
        row_group_size=group_size,
        global_batch_size=BATCH,
        seed=1,
        shuffle=Shuffle(num_lanes=num_lanes, lane_window=window, full_up_to=1),
    )
    steps = np.random.default_rng(0).choice(NUM_EXAMPLES // BATCH, NUM_BATCHES, replace=False)
    distinct, statistic = [], []
    for step in sorted(steps.tolist()):
        _, shards, rows = np.array(list(order.rows_of_step(step))).T
        labels = (shards * SHARD_EXAMPLES + rows) * NUM_CLASSES // NUM_EXAMPLES
        counts = np.bincount(labels, minlength=NUM_CLASSES)
        expected = BATCH / NUM_CLASSES
        distinct.append(np.count_nonzero(counts))
        statistic.append(((counts - expected) ** 2 / expected).sum() / (NUM_CLASSES - 1))
    read = used = 0
    share, lane = BATCH // num_lanes, num_lanes // 2
    slots = range(share * lane, share * (lane + 1))
    for index in range(min(order.windows_per_epoch - 1, 20)):
        unit = order.unit(index, slots)
        groups = np.unique(np.stack([unit.shards, unit.rows // group_size]), axis=1)
        read += int(np.minimum(group_size, order.shard_sizes[0] - groups[1] * group_size).sum())
        used += len(unit.rows)
    together = min(1.0, (group_size - 1) / max(1, window - 1))  # chance that two of a window are of one row group
    return Measured(
        group_size,
        num_lanes,
        windowed,
        float(np.mean(distinct)),
        float(np.mean(statistic)),
        1 + (BATCH / num_lanes - 1) * together,
        read / used,
    )


def draw(results: list[Measured], path: Path) -> None:
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = NUM_CLASSES * (1 - (1 - 1 / NUM_CLASSES) ** BATCH)
    left.axhline(full, color=_INK, linewidth=1, linestyle=":")
    left.text(WINDOWED[0], full + 8, f"full shuffle of the set: {full:.0f}", color=_INK, va="bottom")
    right.axhline(1, color=_INK, linewidth=1, linestyle=":")
    right.text(WINDOWED[0], 0.975, "each row group read once", color=_INK, va="top")
    for group_size in GROUP_SIZES:
        for num_lanes in LANES:
            line, marker = _LINES[num_lanes]
            some = [r for r in results if (r.group_size, r.num_lanes) == (group_size, num_lanes)]
            x = [r.windowed for r in some]
            style = {"color": _COLORS[group_size], "linestyle": line, "marker": marker, "markersize": 5}
            label = f"row groups of {group_size}, {num_lanes} lanes"
            left.plot(x, [r.classes for r in some], label=label, **style)
            right.plot(x, [r.reads for r in some], **style)
    (default,) = [r for r in results if (r.group_size, r.num_lanes, r.windowed) == DEFAULT]
    circle = {"linestyle": "", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": _INK}
    left.plot(default.windowed, default.classes, "o", label="the default, 8 lanes of 512", **circle)
    right.plot(default.windowed, default.reads, "o", **circle)
    _heading(
        left, "Mixing", f"distinct classes in a batch of {BATCH:,}; a set of {NUM_CLASSES:,} classes, sorted by class"
    )
    _heading(right, "Cost", "bytes read / bytes of the set, a worker per lane, no node cache")
    left.set_ylim(0, 700)
    right.set_yscale("log")
    right.yaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 2, 3, 5, 10]))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    right.set_ylim(0.86, 20)
    for axes in (left, right):
        _x_axis(axes)
    right.legend(*left.get_legend_handles_labels(), frameon=False, labelcolor=_INK, loc="upper right", handlelength=2.6)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)


def _heading(axes: Axes, title: str, text: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontweight="bold", pad=22)
    axes.text(0, 1.02, text, transform=axes.transAxes, color=_GRAY)


def _x_axis(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    ticks = WINDOWED[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}\n{_memory(x)}"))
    axes.set_xlabel("lanes x window: images, and their memory at 110 kB each", color=_INK)
    axes.grid(color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRAY)


def _memory(images: float) -> str:
    megabytes = images * IMAGE_BYTES / 1e6
    return f"{megabytes:,.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:,.1f} GB"


def main() -> None:
    results = [measure(g, lanes, w) for g in GROUP_SIZES for lanes in LANES for w in WINDOWED]
    draw(results, PICTURE)
    print("| row group | lanes | window | memory | classes | chi-square | predicted | reads |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        print(
            f"| {r.group_size} | {r.num_lanes} | {r.window:,} | {_memory(r.windowed)} | {r.classes:.0f} "
            f"| {r.chi_square:.2f} | {r.predicted:.2f} | {r.reads:.2f} |"
        )


if __name__ == "__main__":
    main()
