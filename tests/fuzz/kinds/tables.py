"""Tables of paths and labels, and lists of class names, as users write them."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, damaged_json, pick
from fuzz.seeds import CLASSES, encoded, picture

from bit_ray.data.sources.files import open_files
from bit_ray.weights.class_names import label_names

_CELLS = (
    *(
        "",
        " ",
        "a.jpg",
        "b.jpg",
        "../x",
        "a\0b",
        '"',
        "'",
        ";",
        "ant;bee",
        ";;",
        "-1",
        "0",
        "1e9",
        "999999999999",
        "nan",
    ),
    *("ant", "é", "x" * 3000, "@canary@/project/a.txt", "@canary@/fifo", "@canary@", "/dev/zero", "http://x/y", "~/x"),
)


class Kind:
    """``labels.csv`` and the like, and the files that they name."""

    cpu_s, memory, canaries = 8.0, 2**29, {}

    def __init__(self, folder: Path) -> None:
        self.image = encoded(picture(9, 8))
        self.rows = [("a.jpg", "ant", "1"), ("b.jpg", "bee", "2"), ("c.jpg", "cat", "3")]

    def case(self, rng: Rng) -> Case:
        """Damage a table, or a list of names."""
        if chance(rng, 0.3):
            return self._names(rng)
        rows = [list(row) for row in self.rows]
        for _ in range(int(rng.integers(3))):
            pick(rng, rows)[int(rng.integers(3))] = pick(rng, _CELLS)
        columns = ["path", "label", "id"]
        if chance(rng, 0.2):
            columns[int(rng.integers(3))] = pick(rng, ("path", "label", "id", "x", ""))
        if chance(rng, 0.5):
            text = "\n".join(",".join(row) for row in [columns, *rows]) + "\n"
            data = damaged(rng, text.encode()) if chance(rng, 0.5) else text.encode()
            name = "labels.csv"
        else:
            data = self._parquet(rng, columns, rows)
            name = "labels.parquet"
        files = {name: data, "a.jpg": self.image, "b.jpg": self.image, "c.jpg": b"no image"}
        return Case(files, partial(self._open, name, pick(rng, (None, CLASSES)), chance(rng, 0.3)))

    def _parquet(self, rng: Rng, columns: list[str], rows: list[list[str]]) -> bytes:
        values = dict(zip(columns, zip(*rows, strict=True), strict=True))
        table = pa.table({name: pa.array(column) for name, column in values.items()})
        if "label" in table.column_names and chance(rng, 0.5):
            kinds = (
                pa.array([[0], [1], [2]]),
                pa.array([0, 1, None]),
                pa.array([0, -1, 2**40]),
                pa.array([0.5, 1.0, np.nan]),
                pa.array([True, False, True]),
                pa.array([[0, None], None, []]),
                pa.array([b"a", b"\xff", b"c"]),
                pa.array([{"a": 1}] * 3),
                pa.array([2**64 - 1, 0, 1], pa.uint64()),
            )
            table = table.set_column(table.column_names.index("label"), "label", pick(rng, kinds))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        data = sink.getvalue()
        return damaged(rng, data, start=pick(rng, (0, len(data) // 2))) if chance(rng, 0.5) else data

    def _names(self, rng: Rng) -> Case:
        if chance(rng, 0.3):
            return Case({"names.txt": damaged(rng, b"ant\nbee\n\n cat \n")}, partial(self._read_names, "names.txt"))
        tree = pick(
            rng, (list(CLASSES), {"0": "ant", "1": "bee", "2": "cat"}, {"id2label": {"0": "a", "1": "b", "2": "c"}})
        )
        return Case({"names.json": damaged_json(rng, tree)}, partial(self._read_names, "names.json"))

    def _read_names(self, name: str, place: Path, attempt: Attempt) -> None:
        names = label_names(3, str(place / name), model="x")
        assert [type(name) for name in names] == [str] * 3, "no names"

    def _open(self, name: str, classes: tuple[str, ...] | None, several: bool, place: Path, attempt: Attempt) -> None:
        source = open_files(place / name, class_names=classes, multi_label=several)
        assert isinstance(source.identity, dict), "no source"
        examples = attempt(lambda: list(source.part(np.arange(min(len(source), 9)))))
        for example in examples or ():
            labels = getattr(example, "labels", ())
            assert all(0 <= label < len(source.class_names) for label in labels), "a label outside the classes"
