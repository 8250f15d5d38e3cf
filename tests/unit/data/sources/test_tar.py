"""The reader of tar headers, against Python's tarfile, and with headers that lie."""

import gzip
import io
import random
import struct
import tarfile

import pytest

from bit_ray.data.sources.archives import members, read_members, tar_members
from bit_ray.data.sources.tar import TarError, regular_files
from bit_ray.errors import DataError

NAMES = [
    "a.jpg",
    "folder/b.jpg",
    "./c.jpg",
    "x" * 99,
    "x" * 100,
    "y" * 101 + ".jpg",
    "deep/" * 30 + "z" * 90,
    "w" * 255,
    "v/" * 200 + "w" * 300,
    "übung/写真 1.jpg",
    "empty",
]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def packed(names, form, encoding="utf-8"):
    """A tar file with one file of each name, and between them what is passed over."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding=encoding) as tar:
        for number, name in enumerate(names):
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = kind, "target" * (30 if form != tarfile.USTAR_FORMAT else 1)
                tar.addfile(other)
            info = tarfile.TarInfo(name)
            data = random.Random(number).randbytes(number * 337 if name != "empty" else 0)
            info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def as_tarfile_reads_it(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


def found(data):
    return [tuple(extent) for extent in regular_files(io.BytesIO(data), len(data))]


@pytest.mark.parametrize("form", FORMATS)
def test_files_lie_where_tarfile_finds_them(form):
    names = [name for name in NAMES if form != "ustar" or (len(name) < 250 and name != "y" * 101 + ".jpg")]
    data = packed(names, FORMATS[form])
    assert found(data) == as_tarfile_reads_it(data)
    assert len(found(data)) == len(names)
    for (name, offset, size), number in zip(found(data), range(len(names)), strict=True):
        assert data[offset : offset + size] == random.Random(number).randbytes(size), name


def header(name=b"a", size=b"0000000\x005", kind=b"0", magic=b"ustar\x0000", prefix=b"", checksum=None):
    """A header whose fields are as given."""
    if isinstance(size, int):
        size = b"%011o\0" % size
    block = bytearray(512)
    for start, text in ((0, name), (100, b"0000644\0"), (124, size[:12]), (156, kind), (257, magic), (345, prefix)):
        block[start : start + len(text)] = text
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum(block)
    return bytes(block)


END = bytes(1024)


def extended(records, kind=b"x"):
    data = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(b"%d" % length) + len(key) + len(value) + 3 != length:
            length = len(b"%d" % length) + len(key) + len(value) + 3
        data += b"%d %s=%s\n" % (length, key, value)
    return header(b"pax", len(data), kind) + data.ljust(-(-len(data) // 512) * 512, b"\0")


def signed(block):
    return b"%06o\0 " % sum(struct.unpack("512b", block))


OLD = {
    "version 7": header(b"old", 3, b"\0", magic=b"") + b"abc".ljust(512, b"\0"),
    "a directory of version 7": header(b"dir/", 0, b"\0", magic=b"") + header(b"f", 0),
    "spaces around the size": header(b"f", b"        3 \0 ") + b"abc".ljust(512, b"\0"),
    "a size in base 256": header(b"f", b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(512, b"\0"),
    "a sum of signed bytes": header("ü".encode(), 0, checksum=signed),
    "a prefix": header(b"f", 0, prefix=b"some/folder"),
    "a size in an extended header": extended([(b"size", b"3")]) + header(b"f", 0) + b"abc".ljust(512, b"\0"),
    "two extended headers": extended([(b"mtime", b"1.5")])
    + extended([(b"path", b"second"), (b"comment", b"a\nb=c")])
    + header(b"f", 0),
    "a header for all": extended([(b"comment", b"of git")], b"g") + header(b"f", 0),
    "another kind with data": header(b"m", 600, b"M") + bytes(1024) + header(b"f", 0),
    "a contiguous file": header(b"f", 3, b"7") + b"abc".ljust(512, b"\0"),
    "a link that has a size": header(b"l", 700, b"1") + header(b"f", 0),
}


@pytest.mark.parametrize("name", OLD)
def test_formats_of_all_times_are_read_as_tarfile_reads_them(name):
    data = OLD[name] + END
    assert found(data) == as_tarfile_reads_it(data)
    assert found(data) or name == "a directory of version 7"


HOSTILE = {
    "a negative size": (header(b"f", b"-0000000001\0"), "an invalid number"),
    "a negative size in base 256": (header(b"f", b"\xff" * 12), "an invalid size"),
    "a size beyond the end": (header(b"f", 2**30), "truncated: 1,073,741,824 bytes"),
    "a size beyond all disks": (header(b"f", b"\x80" + b"\xff" * 11), "truncated: "),
    "a negative size in an extended header": (
        extended([(b"size", b"-512")]) + header(b"f", 0),
        "an invalid number",
    ),
    "a size of five thousand digits": (extended([(b"size", b"9" * 5000)]) + header(b"f", 0), "an invalid number"),
    "a size in other digits": (extended([(b"size", "٣".encode())]) + header(b"f", 0), "an invalid number"),
    "a size with an underscore": (header(b"f", b"1_0\0"), "an invalid number"),
    "a name of a gigabyte": (header(b"l", 2**30, b"L"), "truncated"),
    "a name of two megabytes": (header(b"l", 2**21, b"L") + bytes(2**21), "a header of 2,097,152 bytes"),
    "an extended header of digits": (header(b"x", 2**20, b"x") + b"1" * 2**20, "an invalid extended header"),
    "a record longer than its header": (
        header(b"x", 20, b"x") + b"99 path=a\n".ljust(512, b"\0"),
        "an invalid extended header",
    ),
    "a record of no length": (header(b"x", 20, b"x") + b"0 path=a\n".ljust(512, b"\0"), "an invalid extended header"),
    "a name for all files": (extended([(b"path", b"x")], b"g") + header(b"f", 0), "with a path or a size"),
    "a sparse file": (header(b"f", 0, b"S"), "a sparse file"),
    "a sparse file of pax": (extended([(b"GNU.sparse.major", b"1")]) + header(b"f", 0), "a sparse file"),
    "a wrong checksum": (header(b"f", 0, checksum=lambda block: b"000001\0 "), "a wrong checksum"),
    "text": (b"hello" * 200, "an invalid number"),
    "a header cut in the middle": (header(b"f", 0)[:100], "no end mark"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_one_line(tmp_path, name):
    data, message = HOSTILE[name]
    whole = data if "cut" in name else data + END
    (tmp_path / "a.tar").write_bytes(header(b"good", 0) + whole)
    with pytest.raises(DataError, match=message) as raised:
        list(tar_members(tmp_path / "a.tar"))
    assert str(raised.value).startswith(f"{tmp_path}/a.tar: damaged or incomplete tar file (")
    assert str(raised.value).isprintable()
    with pytest.raises(DataError, match=message):
        read_members(tmp_path / "a.tar", ["other"])


def test_ten_thousand_headers_before_a_file_are_no_recursion():
    data = extended([(b"comment", b"x")]) * 10_000 + header(b"f", 0) + END
    assert found(data) == [("f", len(data) - 1024, 0)]


def test_any_byte_of_a_header_may_be_wrong():
    data = packed(["a" * 101, "b"], tarfile.PAX_FORMAT)
    for place in range(0, 7 * 512 + 1024, 3):
        for value in (0, 255, data[place] ^ 1):
            try:
                found(data[:place] + bytes([value]) + data[place + 1 :])
            except TarError:
                continue


@pytest.fixture
def bomb(tmp_path):
    """200 MB of zeros in 200 KB, and after them the file that is wanted."""
    path = tmp_path / "images.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(header(b"zeros", 200 * 2**20))
        for _ in range(200):
            file.write(bytes(2**20))
        file.write(header(b"wanted", 0) + END)
    assert path.stat().st_size < 2**18
    return path


@pytest.mark.parametrize("name", ["zeros", "wanted"])
def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(bomb, name):
    with pytest.raises(DataError, match=r"truncated: 209,715,200 bytes from byte 512 on, of \d\d,") as raised:
        read_members(bomb, [name])
    assert str(raised.value).isprintable()


def test_an_archive_of_many_files_of_zeros_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "images.tar.gz"
    with gzip.open(path, "wb") as file:
        for i in range(60):
            file.write(header(b"zeros%d" % i, 2**20) + bytes(2**20))
        file.write(END)
    for read in (lambda: list(members(path)), lambda: read_members(path, ["wanted"])):
        with pytest.raises(DataError, match="100 times its size|truncated: 1,048,576 bytes from byte"):
            read()
    assert [file.name for file in tmp_path.iterdir()] == ["images.tar.gz"]


def test_what_an_unpacking_that_was_killed_has_left_is_removed_by_the_next(tmp_path):
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(header(b"f", 0) + END)
    (tmp_path / ".a.tar.0123456789abcdef0123456789abcdef.partial").write_bytes(bytes(99))
    assert [member.name for member in members(tmp_path / "a.tar.gz")] == ["f"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.gz"]
