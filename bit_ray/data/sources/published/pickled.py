"""Pickles as data, read without the pickle module: numbers, text, lists of them and arrays of bytes, in a dictionary.

A pickle is a program for a small stack machine (Python's Lib/pickletools.py describes its opcodes). The machine here
has only the opcodes for such data, of protocols 2 to 4, and cannot call anything: each allowed name in the program is
replaced by a value that is made here, with every length checked.
"""

import math
import pickletools
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

# A batch of 50,000 CIFAR images has 250,000.
_MAX_OPCODES = 2_000_000
_MAX_DIMENSIONS = 4

# Opcodes that push their argument, or a constant.
_ARGUMENTS = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
# Names with which NumPy pickles an array, by its modules' names before and since 2.0.
_NAMES = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # bytes, as Python 3 writes them for Python 2
}
_MARK = object()
_BYTE = object()  # the type of an array's values


@dataclass(frozen=True)
class _Name:
    """Placeholder for one of ``_NAMES``."""

    text: str


@dataclass
class _Array:
    """An array: its type and shape come after it."""

    values: npt.NDArray[np.uint8] | None = None


def read_pickle(data: bytes) -> dict[str, Any]:
    """Return the dictionary in a pickle, its keys as text.

    The values are numbers, text, None, lists of numbers and text, and arrays of uint8; ``str`` of Python 2 is read as
    Latin-1.

    Raises:
        ValueError: The pickle is damaged, too long, or has other content.
    """
    try:
        found = _run(data)
    except (IndexError, KeyError, TypeError) as error:  # an empty stack, a memory never written, an invalid key
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError(f"it has {type(found).__name__}, not a dictionary")
    values = {key: _finished(value) if isinstance(value, _Array) else value for key, value in found.items()}
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in values.items()}


def _run(data: bytes) -> Any:
    machine = _Machine(2 * len(data))
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == _MAX_OPCODES:
            raise ValueError(f"it is longer than {_MAX_OPCODES:,} opcodes")
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    (found,) = machine.stack
    return found


class _Machine:
    """Stack and memory of the program while it runs; only tuples of arguments nest on them."""

    def __init__(self, max_encoded: int) -> None:
        self.stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._left = max_encoded
        """Characters that may still become bytes: each is read once from the file, but may be used many times."""

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _PUT:
            self._memory[argument] = stack[-1]
        elif name in _GET:
            stack.append(self._memory[argument])
        elif name == "MEMOIZE":
            self._memory[len(self._memory)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple(self._take(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._take_to_mark()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1) if name == "APPEND" else self._take_to_mark()
            _extend(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(2) if name == "SETITEM" else self._take_to_mark()
            _update(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_named(argument))
        elif name == "STACK_GLOBAL":
            stack.append(_named(" ".join(self._take(2))))
        elif name == "REDUCE":
            stack.append(self._made(*self._take(2)))
        elif name == "BUILD":
            (state,) = self._take(1)
            self._set_state(stack[-1], state)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the opcode {name}, which plain data do not need")

    def _take(self, number: int) -> list[Any]:
        first = len(self.stack) - number
        if first < 0:
            raise IndexError("too few values")
        taken = self.stack[first:]
        del self.stack[first:]
        return taken

    def _take_to_mark(self) -> list[Any]:
        for index in reversed(range(len(self.stack))):
            if self.stack[index] is _MARK:
                taken = self.stack[index + 1 :]
                del self.stack[index:]
                return taken
        raise IndexError("no mark")

    def _made(self, name: Any, arguments: Any) -> Any:
        """Return the value that replaces the result of calling the named function."""
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a function")
        if name.text == "array" and arguments[:1] == (_Name("ndarray"),):
            return _Array()  # to be filled; the other arguments do not matter
        if name.text == "dtype" and arguments[:1] == ("u1",):
            return _BYTE
        if name.text == "encode" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
            return self._encoded(arguments[0])
        raise ValueError(f"it makes {name.text} from something other than bytes")

    def _set_state(self, target: Any, state: Any) -> None:
        if not isinstance(state, tuple):
            raise ValueError("it sets a state that is not a tuple")
        if target is _BYTE:
            # Version, byte order, no fields, sizes of the type, no flags.
            if state != (3, "|", None, None, None, -1, -1, 0):
                raise ValueError("it changes the type of an array's values")
        elif isinstance(target, _Array) and target.values is None:
            target.values = self._filled(*state)
        else:
            raise ValueError("it sets the state of something without a state")

    def _filled(self, version: Any, shape: Any, kind: Any, is_fortran: Any, raw: Any) -> npt.NDArray[np.uint8]:
        if isinstance(raw, str):  # the bytes of Python 2
            raw = self._encoded(raw)
        if version != 1 or kind is not _BYTE or not isinstance(raw, bytes):
            raise ValueError("it has an array of something other than bytes")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("it has an array without a valid shape")
        if len(shape) > _MAX_DIMENSIONS or math.prod(shape) != len(raw):
            raise ValueError("it has an array with a size other than its shape")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")

    def _encoded(self, text: str) -> bytes:
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("it makes more bytes than it has")
        return text.encode("latin1")


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list) or not all(isinstance(item, (int, str, bytes)) for item in items):
        raise ValueError("it has a list of something other than numbers and text")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values):
        raise ValueError("it sets items of something that is not a dictionary")
    for key, value in zip(keys, values, strict=True):
        if not isinstance(key, (str, bytes)) or not isinstance(value, (NoneType, int, float, str, bytes, list, _Array)):
            raise ValueError(f"it has a dictionary of {type(key).__name__} to {type(value).__name__}")
        target[key] = value


def _named(text: str) -> _Name:
    if text not in _NAMES:
        raise ValueError(f"it names {text.replace(' ', '.')}, which plain data do not need")
    return _Name(_NAMES[text])


def _finished(array: _Array) -> npt.NDArray[np.uint8]:
    if array.values is None:
        raise ValueError("it has an array without values")
    return array.values
