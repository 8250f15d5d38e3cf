"""Convert labels - names, indices, ids, one or several per image - to class indices and class names."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bit_ray.config import is_unicode
from bit_ray.errors import DataError, brief


def to_indices(
    uri: str, lists: pa.Array, class_names: Sequence[str] | None, row_names: Sequence[str] | None = None
) -> tuple[pa.Array, tuple[str, ...]]:
    """Return lists of class indices, and the class names: given, or the sorted labels, or 0 to the largest index.

    Args:
        uri: Where the labels are, for messages.
        lists: Labels of each row, names or numbers. A number is the name of a class if all labels are names of classes,
            or if the classes are numbers other than 0, 1, 2 and so on; else an index.
        class_names: In the order of the class indices.
        row_names: Names of the rows in messages, if not their numbers.

    Raises:
        DataError: A label that is missing or outside the class list; without a list, numbers of which less than half
            occur: they are probably ids, and the network would have unused outputs.
    """

    def row(position: int) -> str:
        number = int(rows[position])
        return f"{uri}: row {number + 1}" if row_names is None else f"{uri}: {row_names[number]}"

    values = lists.flatten()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    unfit = f"{uri}: labels of the type {values.type}; accepted: whole numbers, or names as text; correct the column"
    if not (is_text(values.type) or pa.types.is_primitive(values.type) or pa.types.is_null(values.type)):
        raise DataError(unfit)
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0)).astype(np.int64)
    rows = np.repeat(np.arange(len(lists)), lengths)
    if is_text(values.type):
        values = pc.utf8_trim_whitespace(values)
        kept = np.asarray(pc.not_equal(values, ""))
        values, rows = values.filter(pa.array(kept)), rows[kept]
        lengths = np.bincount(rows, minlength=len(lists))
    if values.null_count:
        raise DataError(f"{row(int(np.argmax(values.is_null())))} has an empty label; accepted: a label; add it")
    distinct = pc.unique(values)
    numbers = _numbers(distinct)
    if class_names is not None:
        classes = tuple(class_names)
    elif numbers is not None:
        num_classes = max(numbers, default=-1) + 1
        if num_classes > 2 * len(numbers):
            raise DataError(
                f"{uri}: labels: {len(numbers):,} different numbers up to {num_classes - 1:,}: ids, not indices; "
                "accepted: indices from 0 on, or names; give the ids as class list, one per line: --class-names FILE "
                "(class_names)"
            )
        classes = tuple(str(i) for i in range(num_classes))
    elif is_text(values.type):
        classes = tuple(sorted(distinct.to_pylist()))
    else:
        raise DataError(unfit)
    check_classes(uri, classes, "labels in the table, or a class list")
    counted = tuple(str(i) for i in range(len(classes)))
    ids = classes != counted and all(name.isdecimal() for name in classes)
    named = {str(value) for value in distinct.to_pylist()} <= set(classes)
    if ids or named or (numbers is None and is_text(values.type)):
        indices = pc.index_in(values.cast(pa.large_string()), value_set=pa.array(classes, pa.large_string()))
        wrong = np.asarray(indices.is_null())
    else:
        indices = values.cast(pa.int64()) if numbers is not None else pa.nulls(len(values), pa.int64())
        array = np.asarray(indices.fill_null(-1))
        wrong = (array < 0) | (array >= len(classes))
    if wrong.any():
        first = int(np.argmax(wrong))
        raise DataError(outside(row(first), str(values[first].as_py()), classes))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), indices.cast(pa.int32())), classes


def _numbers(distinct: pa.Array) -> list[int] | None:
    """Return the labels as integers if all of them are integers."""
    try:
        return [int(value) for value in distinct.cast(pa.int64()).to_pylist()]
    except pa.ArrowException:
        return None


def one_each(values: pa.Array) -> pa.Array:
    """Return lists of one value each."""
    return pa.LargeListArray.from_arrays(pa.array(np.arange(len(values) + 1), pa.int64()), values)


def check_classes(uri: str, classes: tuple[str, ...], accepted: str) -> None:
    """Raise DataError if the class list is empty, or has a name twice or an invalid one."""
    if not classes:
        raise DataError(f"{uri}: the class list is empty; accepted: {accepted}; check the path")
    for i, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip() or not is_unicode(name):
            raise DataError(
                f"{uri}: class {i} is called {brief(name)}; accepted: text in UTF-8 that is not empty; name the class"
            )
    if len(set(classes)) < len(classes):
        twice = next(name for name, count in Counter(classes).items() if count > 1)
        raise DataError(f"{uri}: class {twice!r} is twice in the class list; accepted: unique names; remove one")


def outside(where: str, label: str, classes: tuple[str, ...]) -> str:
    """Return the message for a label that is not in the class list."""
    names = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    return (
        f"{where}: label {label!r} is outside the class list; accepted: one of {len(classes)} classes ({names}) "
        "or its index; correct the label or the class list"
    )


def is_number(text: str) -> bool:
    """Return whether a text is a whole number from 0 to 999,999,999."""
    return text.isdecimal() and len(text) < 10


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
