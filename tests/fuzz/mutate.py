"""Damage to valid input, decided by a random generator alone: of bytes, of JSON trees, and of the words in them."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

CANARY = "@canary@"
"""Stands in an input for the path of the files that nothing may touch; as long whatever that path is."""

_BYTES = (0x00, 0x01, 0x20, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBERS = (0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)

# What json.dumps cannot write, by what stands for it in a tree: nesting that overflows a stack, numbers that overflow.
_DEEP = 100_000
_TEXTS = {
    "@list@": "[" * _DEEP + "]" * _DEEP,
    "@dict@": '{"a":' * _DEEP + "1" + "}" * _DEEP,
    "@digits@": "9" * 6000,
    "@exponent@": "1e400",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 63, 256, 2**31, 2**53 + 1, 2**63, 2**64, 10**9, 10**12, 10**18, -(10**18)),
    *(0.5, -0.0, 1.5, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", " ", "0", "1", "-1", "x", "x" * 5000, "a\0b", "a\nb", "a\u2028b", "\ud800", "\x1b[31m", "NaN", "null"),
    *("..", ".", "../x", "../../../x", "a/../../b", f"../{CANARY}", CANARY, f"{CANARY}/project", f"{CANARY}/fifo"),
    *(f"file://{CANARY}/project", "~", "~/x", "$HOME", "%2e%2e/x", "x?y=z", "x#y"),
    *([], [[]], [None], {}, {"": 0}, {"a": {"a": {}}}, *_TEXTS),
)
"""In place of any value of a tree; see also the words of a kind."""


def generator(seed: int, number: int) -> Rng:
    """All that decides input ``number`` of a seed."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))


def pick(rng: Rng, items: Sequence[Any]) -> Any:
    """One of the items."""
    return items[int(rng.integers(len(items)))]


def chance(rng: Rng, p: float) -> bool:
    """True with probability p."""
    return bool(rng.random() < p)


def damaged(rng: Rng, data: bytes, others: Sequence[bytes] = (), start: int = 0, stop: int | None = None) -> bytes:
    """Change a few places between ``start`` and ``stop``; ``others`` are what pieces may come from."""
    out = bytearray(data)
    stop = len(data) if stop is None else stop
    for _ in range(int(rng.geometric(0.6))):
        low = min(start, len(out))
        at = low + int(rng.integers(max(1, min(stop, len(out)) - low)))
        pick(rng, _DAMAGES)(rng, out, at, others or (data,))
    return bytes(out)


def _flip(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    if at < len(out):
        out[at] ^= 1 << int(rng.integers(8))


def _set(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    out[at : at + 1] = bytes([pick(rng, _BYTES)])


def _number(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    width = pick(rng, (1, 2, 4, 8))
    value = pick(rng, _NUMBERS) % 256**width
    out[at : at + width] = value.to_bytes(width, pick(rng, ("little", "big")))


def _nudge(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    """Make a number, which may be a length or an offset, a little larger or smaller."""
    width, order = pick(rng, (1, 2, 4, 8)), pick(rng, ("little", "big"))
    value = int.from_bytes(out[at : at + width], order) + int(rng.integers(-16, 17))
    out[at : at + width] = (value % 256**width).to_bytes(width, order)


def _cut(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    del out[at : at + int(rng.geometric(0.1))]


def _repeat(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    out[at:at] = out[at : at + int(rng.geometric(0.05))] * pick(rng, (1, 1, 1, 2, 64))


def _noise(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    out[at : at + int(rng.geometric(0.1))] = rng.bytes(int(rng.geometric(0.1)))


def _truncate(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    del out[at:]


def _splice(rng: Rng, out: bytearray, at: int, others: Sequence[bytes]) -> None:
    other = pick(rng, others)
    length = int(rng.geometric(0.01))
    source = int(rng.integers(max(1, len(other))))
    out[at : at + pick(rng, (0, length))] = other[source : source + length]


_Damage = Callable[[Rng, bytearray, int, Sequence[bytes]], None]
# Flipped bits come through parsers the farthest, so there are more of them.
_DAMAGES: tuple[_Damage, ...] = (
    *(_flip, _flip, _flip, _flip, _set, _set, _number, _number, _nudge, _nudge),
    *(_cut, _repeat, _noise, _truncate, _splice),
)


def damaged_json(rng: Rng, tree: Any, words: Sequence[Any] = ()) -> bytes:
    """Write a tree as JSON with a few of its places changed; ``words`` are values that mean something to its reader."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.geometric(0.7))):
        tree = _changed(rng, tree, words)
    text = json.dumps(tree, indent=pick(rng, (None, 1)))
    for name, meant in _TEXTS.items():
        text = text.replace(f'"{name}"', meant)
    data = text.encode()
    return damaged(rng, data) if chance(rng, 0.1) else data


def damaged_tensors(rng: Rng, data: bytes) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if chance(rng, 0.3):
        return damaged(rng, data, stop=length + 8)
    header = damaged_json(rng, json.loads(data[8 : 8 + length]), ("F16", "F32", "I64", "BOOL", [0, 2**40]))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _changed(rng: Rng, tree: Any, words: Sequence[Any]) -> Any:
    places = [([tree], 0), *_places(tree)] if isinstance(tree, (dict, list)) else [([tree], 0)]
    holder, key = pick(rng, places)
    value = holder[key]
    action = int(rng.integers(8))
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[pick(rng, ("x", "", "__class__", str(pick(rng, places)[1])))] = holder.pop(key)
    elif action == 2:
        other, place = pick(rng, places)
        holder[key] = copy.deepcopy(other[place])
    elif action == 3 and isinstance(value, (int, float)):
        holder[key] = pick(rng, (value + 1, value - 1, -value, value * 10**9, value + 0.5, str(value)))
    elif action == 3 and isinstance(value, str):
        end = pick(rng, ("", "/", "/..", "\0", "\n", " ", "?x=y", "\ud800", value))
        holder[key] = value[: int(rng.integers(len(value) + 1))] + end
    elif action == 3 and isinstance(value, list) and value:
        holder[key] = value * pick(rng, (2, 3)) if chance(rng, 0.5) else value[:-1]
    elif action == 4:
        holder[key] = pick(rng, ([value], {"x": value}, [value] * 3))
    else:
        holder[key] = copy.deepcopy(pick(rng, words if words and chance(rng, 0.5) else VALUES))
    return places[0][0][0]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Each value in a tree, as what holds it and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    found = [(tree, key) for key in keys]
    return found + [place for key in keys if isinstance(tree[key], (dict, list)) for place in _places(tree[key])]
