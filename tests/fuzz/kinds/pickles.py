"""Pickles as the readers of CIFAR take them: damaged, and programs of what such a pickle may name."""

import pickle
import pickletools
from functools import partial
from pathlib import Path

import numpy as np
from fuzz.kind import Attempt, Case
from fuzz.mutate import Rng, chance, damaged, pick

from bit_ray.data.sources.published.cifar import open_cifar
from bit_ray.data.sources.published.files import PublishedFiles

_GLOBALS = (
    b"cnumpy\ndtype\n",
    b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"cnumpy._core.multiarray\n_reconstruct\n",
    b"c_codecs\nencode\n",
)
_FOREIGN = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nload\n", b"cnumpy.core.multiarray\nscalar\n")
_SIZES = (0, 1, -1, 2, 8, 3072, 6144, 2**16, 2**20, 2**31 - 1, 2**31, 2**40, 2**62)


class Kind:
    """Batches of CIFAR-10's Python version."""

    cpu_s, memory, canaries = 8.0, 2**29, {}

    def __init__(self, folder: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
        batch = {"data": pixels, "labels": [0, 1], "filenames": ["a.png", "b.png"], "batch_label": "x"}
        self.meta = pickle.dumps({"label_names": [f"n{i}" for i in range(10)], "num_vis": 3072}, 2)
        self.batches = [pickle.dumps(batch, protocol) for protocol in (2, 4)]
        self.batches.append(pickle.dumps({b"data": pixels, b"labels": [0, 1]}, 2))

    def case(self, rng: Rng) -> Case:
        """Damage bytes or operations of a pickle, or write one."""
        action = int(rng.integers(4))
        good = pick(rng, self.batches)
        if action == 0:
            batch = damaged(rng, good, [self.meta], 0, pick(rng, (len(good), 250)))
        elif action == 1:
            batch = _operations_changed(rng, good)
        else:
            batch = _Program(rng).batch()
        meta = damaged(rng, self.meta, self.batches) if chance(rng, 0.1) else self.meta
        folder = "cifar10/cifar-10-batches-py"
        return Case({f"{folder}/test_batch": batch, f"{folder}/batches.meta": meta}, partial(self._open, len(batch)))

    def _open(self, num_bytes: int, place: Path, attempt: Attempt) -> None:
        source = open_cifar(["test"], PublishedFiles(dataset="cifar10", folder=place, how_to_get="x"))
        assert source.pixels.nbytes <= num_bytes, "more pixels than the file has bytes"
        assert len(source.pixels) == len(source.labels) == len(source), "not one label for each image"
        assert all(len(example.image) for example in source.part(np.arange(min(len(source), 3)))), "no images"


def _operations_changed(rng: Rng, data: bytes) -> bytes:
    """Repeat, drop, swap or replace whole operations of a pickle."""
    starts = [at for _, _, at in pickletools.genops(data)]
    operations = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(int(rng.geometric(0.5))):
        at, other = (int(rng.integers(len(operations))) for _ in range(2))
        action = int(rng.integers(5))
        if action == 0:
            operations[at] = pick(rng, (b"", b"0", b"2", b"N", b"}", b"]", b")", b"R", b"b", b"s", b"u", b"\x81"))
        elif action == 1:
            operations[at], operations[other] = operations[other], operations[at]
        elif action == 2:
            operations.insert(at, operations[other])
        elif action == 3:
            operations[at] = _whole(int(pick(rng, _SIZES)))
        else:
            operations[at] = pick(rng, (*_GLOBALS, *_FOREIGN))
    return b"".join(operations)


class _Program:
    """A pickle that makes types and arrays, changes their state, and makes arrays over them."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng
        self.memo: dict[str, list[int]] = {"dtype": [], "array": []}
        self.used = 0

    def batch(self) -> bytes:
        """A whole batch, after some statements; they often are an array, a change of its type, and a view."""
        steps = [(1, 0.9), (2, 0.6), (4, 0.7)]
        lines = [self._statement(step) for step, p in steps if chance(self.rng, p)]
        for _ in range(int(self.rng.integers(3))):
            lines.insert(int(self.rng.integers(len(lines) + 1)), self._statement(int(self.rng.integers(7))))
        data = self._any("array") if chance(self.rng, 0.9) else self._bytes()
        labels = b"](K\x00K\x01K\x02e" if chance(self.rng, 0.3) else b"]"
        if chance(self.rng, 0.3):
            labels = b"](" + b"K\x00" * int(pick(self.rng, (1, 2, 100, 1000))) + b"e"
        return (
            b"\x80\x02"
            + b"".join(line + b"0" for line in lines)
            + b"}(U\x04data"
            + data
            + b"U\x06labels"
            + labels
            + b"u."
        )

    def _statement(self, kind: int) -> bytes:
        if kind == 0:
            return self._kept("dtype", self._dtype())
        if kind == 1:
            return self._kept("array", self._array())
        if kind == 2:
            return self._any("dtype") + self._dtype_state() + b"b"
        if kind == 3:
            return self._any("array") + self._array_state() + b"b"
        if kind == 4:
            return self._kept("array", self._view())
        if kind == 5:
            return self._any("array") + b"(" + self._int() + self._int() + b"u"
        return self._any(pick(self.rng, ("dtype", "array"))) + pick(self.rng, (b")b", b"}b", b"]b", b"Nb"))

    def _kept(self, kind: str, made: bytes) -> bytes:
        self.memo[kind].append(self.used)
        self.used += 1
        return made + b"q" + bytes([self.used - 1])

    def _any(self, kind: str) -> bytes:
        if self.memo[kind] and chance(self.rng, 0.8):
            number = self.memo[kind][-1] if chance(self.rng, 0.7) else pick(self.rng, self.memo[kind])
            return b"h" + bytes([number])
        return self._kept(kind, self._dtype() if kind == "dtype" else self._array())

    def _dtype(self) -> bytes:
        name = pick(self.rng, (b"u1", b"u1", b"V1", b"V8", b"S1", b"i8", b"O8", b"U1", b"f4", b"V3072"))
        return _GLOBALS[0] + b"(" + _text(name) + b"\x89\x88tR"

    def _dtype_state(self) -> bytes:
        version, size = pick(self.rng, (3, 3, 4, 0)), int(pick(self.rng, _SIZES))
        order = pick(self.rng, (b"|", b"<", b">", b"x"))
        rest = [b"K\x01", b"K\x00"] if chance(self.rng, 0.7) else [self._int(), self._int()]
        parts = [_whole(version), _text(order), b"N", b"N", b"N", _whole(size), *rest]
        return b"(" + b"".join(parts) + b"t"

    def _array(self) -> bytes:
        made = pick(self.rng, _GLOBALS[2:4]) + _GLOBALS[1] + b"K\x00\x85" + _text(b"b") + b"\x87R"
        return made + self._array_state() + b"b" if chance(self.rng, 0.9) else made

    def _array_state(self) -> bytes:
        rows = int(pick(self.rng, (1, 1, 2, 3)))
        shape = b"K" + bytes([rows]) + _whole(3072) + b"\x86" if chance(self.rng, 0.7) else self._int() + b"\x85"
        if chance(self.rng, 0.2):
            shape = self._int() + _whole(3072) + b"\x86"
        raw = _raw(bytes(rows * 3072)) if chance(self.rng, 0.7) else self._bytes()
        return b"(K\x01" + shape + self._any("dtype") + b"\x89" + raw + b"t"

    def _view(self) -> bytes:
        """An array over the memory of another."""
        shape = _whole(int(pick(self.rng, (1, 2, 100, 100_000)))) + _whole(3072) + b"\x86"
        more = pick(self.rng, (b"", b"", self._int(), self._int() + self._int() + self._int() + b"\x86"))
        kind = _text(b"u1") if chance(self.rng, 0.6) else self._any("dtype")
        return _GLOBALS[1] + b"(" + shape + kind + self._any("array") + more + b"tR"

    def _bytes(self) -> bytes:
        return _raw(self.rng.bytes(int(pick(self.rng, (0, 1, 8, 3072, 6144)))))

    def _int(self) -> bytes:
        return _whole(int(pick(self.rng, _SIZES)))


def _whole(value: int) -> bytes:
    return b"I%d\n" % value


def _text(value: bytes) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value


def _raw(value: bytes) -> bytes:
    return b"T" + len(value).to_bytes(4, "little") + value
