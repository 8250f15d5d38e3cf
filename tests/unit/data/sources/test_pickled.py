"""Batches of CIFAR as pickles: those that Python and NumPy write, and those made to harm whoever reads them."""

import json
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from bit_ray.data.sources.published.pickled import read_pickle

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value)
        assert type(found[key]) is type(value)


def of_python_2(labels, names, raw):
    """A batch with the opcodes that the publisher's files begin with: Python 2's cPickle, protocol 2."""

    def text(value):
        return b"U" + bytes([len(value)]) + value.encode()

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x08cnumpy\nndarray\nq\x09K\x00\x85q\x0aU\x01bq\x0b\x87q\x0cRq\x0d(K\x01"
        + b"J"
        + struct.pack("<i", len(labels))
        + b"M\x00\x0c\x86q\x0ecnumpy\ndtype\nq\x0fU\x02u1q\x10K\x00K\x01\x87q\x11Rq\x12(K\x03U\x01|q\x13NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x14b\x89T"
        + struct.pack("<i", len(raw))
        + raw
        + b"q\x15tq\x16b"
    )
    return (
        b"\x80\x02}q\x01("
        + (text("batch_label") + b"q\x02" + text("training batch 1 of 5") + b"q\x03")
        + (text("labels") + b"q\x04]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e")
        + (text("data") + array)
        + (text("filenames") + b"r\x17\x00\x00\x00]r\x18\x00\x00\x00(" + b"".join(map(text, names)) + b"eu.")
    )


def test_the_opcodes_of_python_2_are_read_as_python_reads_them():
    data = of_python_2([6, 9], ["leptodactylus_pentadactylus_s_000004.png", "camion_s_000148.png"], IMAGES.tobytes())
    same(read_pickle(data), pickle.loads(data, encoding="latin1"))
    assert np.array_equal(read_pickle(data)["data"], IMAGES)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_before_and_since_its_version_2_is_read(protocol, module, order):
    batch = {
        "data": np.array(IMAGES, order=order),
        "labels": [3, 99],
        "filenames": [b"a.png", "\u00fc.png"],
        "num_vis": 3072,
        "none": None,
        "more": [0, -1, 70_000, 2**40, True],
    }
    data = pickle.dumps(batch, protocol)
    if protocol < 4:  # later the length of a name stands before it
        data = data.replace(b"cnumpy._core.multiarray\n", b"c" + module + b"\n")
    same(read_pickle(data), batch)


def test_keys_of_python_3_as_bytes_are_text():
    assert read_pickle(pickle.dumps({b"label_names": [b"cat"]}, 2)) == {"label_names": [b"cat"]}


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(3, np.int64), np.zeros(3, "S1"), np.array([{}])])
def test_arrays_of_anything_but_bytes_are_refused(values):
    with pytest.raises(ValueError, match="than bytes"):
        read_pickle(pickle.dumps({"data": values}, 2))


def test_a_pickle_cut_anywhere_or_with_a_wrong_byte_is_an_error_or_a_dictionary():
    data = pickle.dumps({"data": IMAGES[:1, :8], "labels": [1, 300, 70_000], "names": ["a", b"b"]}, 2)
    for stop in range(len(data)):
        with pytest.raises(ValueError, match="."):
            read_pickle(data[:stop])
    for place in range(len(data)):
        for value in (0, 255, data[place] ^ 1, *b"(.0}]bRtcsue"):
            try:
                assert isinstance(read_pickle(data[:place] + bytes([value]) + data[place + 1 :]), dict)
            except ValueError:
                continue


# A program to make an array of four bytes, and remember it (9) and its type (8).
ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87Rq\x09(K\x01K\x04\x85"
    b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87Rq\x08(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"U\x04abcdtb"
)


def dictionary(value):
    return b"\x80\x02}U\x04data" + value + b"s."


HOSTILE = {
    "a type of another size": dictionary(b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNM\x10\x27K\x01K\x00tb"),
    "the type of an array changed afterwards": dictionary(
        ARRAY + b"h\x08(K\x03U\x01|NNNJ\x40\x42\x0f\x00K\x01K\x00tb0"
    ),
    "a view of a buffer": dictionary(ARRAY + b"sU\x01vcnumpy\nndarray\n(M\x04\x00\x85U\x02u1h\x09tR"),
    # 30 rows of pixels from the memory behind an array of four bytes, whose type was made larger.
    "pixels of foreign memory": dictionary(
        ARRAY.replace(b"U\x02u1", b"U\x02S1").replace(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff", b"NNNK\x01K\x01")
        + b"sU\x04typeh\x08(K\x03U\x01|NNNM\x00\x5aK\x01K\x00tb"
        + b"sU\x06labels]("
        + b"K\x00" * 30
        + b"e"
        + b"sU\x04datacnumpy\nndarray\n(K\x1eM\x00\x0c\x86U\x02u1h\x09tR"
    ),
    "an array written into": dictionary(ARRAY + b"K\x00K\xffs"),
    "an array written into by many": dictionary(ARRAY + b"(K\x00K\xffK\x01K\xffu"),
    "an array added to": dictionary(ARRAY + b"K\x00a"),
    "an array filled twice": dictionary(ARRAY + b"(K\x01K\x04\x85h\x08\x89U\x04abcdtb"),
    "an array never filled": dictionary(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"),
    "an array larger than its bytes": dictionary(ARRAY.replace(b"K\x04\x85", b"J\x00\x00\x00\x7f\x85")),
    "an array of a negative size": dictionary(ARRAY.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85")),
    "an array of pointers": dictionary(ARRAY.replace(b"U\x02u1", b"U\x02O8")),
    "a function of the system": dictionary(b"cposix\nsystem\nU\x04true\x85R"),
    "a function that reads files": dictionary(b"cnumpy\nfromfile\nU\x0b/etc/passwd\x85R"),
    "an attribute by name": dictionary(b"cbuiltins\ngetattr\ncnumpy\nndarray\nU\x08__dict__\x86R"),
    "an attribute of a class": dictionary(b"cnumpy\nndarray.tofile\n"),
    "attributes set on a function": dictionary(b"c_codecs\nencode\n}U\x01aK\x01s}U\x08__name__U\x01xs\x86b"),
    "attributes set on a class": dictionary(b"cnumpy\ndtype\n}U\x01aK\x01s\x86b"),
    "an extension": dictionary(b"\x82\x01"),
    "a larger extension": dictionary(b"\x84\x01\x00\x00\x00"),
    "a persistent id": dictionary(b"U\x01xQ"),
    "a persistent id in a line": dictionary(b"Pfile\n"),
    "an instance": dictionary(b"(U\x01xinumpy\nndarray\n"),
    "an object": dictionary(b"(cnumpy\nndarray\nK\x08o"),
    "a new object": dictionary(b"cnumpy\nndarray\nJ\x00\xe1\xf5\x05\x85\x81"),
    "a whole number of two gigabytes": dictionary(b"\x8b\xff\xff\xff\x7f"),
    "a whole number of negative length": dictionary(b"\x8b\xff\xff\xff\xff"),
    "text longer than the file": dictionary(b"T\xff\xff\xff\x7f"),
    "bytes longer than the memory": dictionary(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"),
    # Python computes the hash of a tuple anew each time, on the processor's stack.
    "a key of two to the power of sixty parts": b"\x80\x02})" + b"\x85" + b"q\x01h\x01\x86" * 60 + b"K\x01s.",
    "a key nested a million times": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
    "labels nested a million times": dictionary(b"]" * 1_000_000 + b"a" * 999_999),
    "labels of two to the power of sixty": dictionary(b"]" + b"q\x01]h\x01ah\x01a" * 60),
    "an array in a list": dictionary(b"]" + ARRAY + b"a"),
    "the same text made bytes a thousand times": dictionary(
        b"X\x00\x00\x10\x00" + b"x" * 2**20 + b"q\x01sU\x04more]" + b"c_codecs\nencode\nh\x01U\x06latin1\x86Ra" * 2000
    ),
    "three million numbers": dictionary(b"](" + b"K\x00" * 3_000_000 + b"e"),
    "nothing on the stack": b"\x80\x02s.",
    "no mark": b"\x80\x02}u.",
    "a mark left over": b"\x80\x02}(.",
    "a memory never written": dictionary(b"h\x07"),
    "nothing": b"",
}

# Each pickle in a process of its own, so that one that crashes or hangs is seen and ends nothing else.
READER = """
import json, os, resource, signal, sys
from bit_ray.data.sources.published.cifar import _python_batch
from bit_ray.errors import DataError

for path in sys.argv[1:]:
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(30)
        resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
        try:
            _python_batch(open(path, "rb").read(), "batch")
            said = ["accepted", ""]
        except DataError as error:
            said = ["refused", str(error)]
        except BaseException as error:
            said = ["traceback", repr(error)[:200]]
        os.write(sender, json.dumps(said).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as answer:
        said = answer.read()
    status = os.waitpid(child, 0)[1]
    print(said or json.dumps(["ended by signal", str(os.waitstatus_to_exitcode(status))]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pickles")
    paths = []
    for number, data in enumerate(HOSTILE.values()):
        paths.append(folder / f"{number}")
        paths[-1].write_bytes(data)
    reader = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True, timeout=240, check=True
    )
    return dict(zip(HOSTILE, map(json.loads, reader.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_made_to_harm_is_refused_in_one_line(answers, name):
    kind, text = answers[name]
    assert kind == "refused", (kind, text)
    assert text.startswith("batch: not a batch of CIFAR (")
    assert len(text) < 200
    assert "\n" not in text
