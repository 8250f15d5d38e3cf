"""Images to be classified in bulk: files, folders or a shard set, in parts that can be read in any process."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from bit_ray import store
from bit_ray.data.shards.manifest import MANIFEST, Manifest, read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.sources.endings import IMAGE_SUFFIXES, is_image, named, others_by_ending
from bit_ray.errors import ConfigError, DataError

S = TypeVar("S")
T = TypeVar("T")

# Enough parts for some dozens of workers, small enough to show progress, large enough for a file each.
_NUM_PARTS, _FEWEST, _MOST = 256, 16, 4096


@dataclass(frozen=True)
class EncodedImage:
    """One image of a part."""

    name: str
    """Path as the user gave it, or the id of an example."""
    data: bytes | None
    """Its bytes; None if it cannot be read."""
    reason: str = ""
    """Why not."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files by path or URI."""

    paths: pa.Array
    """large_string, in the order of the output; relative ones start at ``directory``."""
    directory: str
    """Current directory of the process that listed them."""
    others: Mapping[str, int]
    """Files of the folders whose endings are not those of images, by ending."""
    convert: bool = False
    """Files do not say whether to convert what is not plain RGB."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    @property
    def part_size(self) -> int:
        """Images of a part; depends only on their number, so that any cluster can continue another's work."""
        return min(_MOST, max(_FEWEST, -(-len(self) // _NUM_PARTS)))

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-len(self) // self.part_size)

    @property
    def digest(self) -> str:
        """SHA-256 over all paths, not over the files' content."""
        sha = hashlib.sha256(self.directory.encode())
        for start in range(0, len(self), 65_536):
            sha.update("\0".join(self.paths[start : start + 65_536].to_pylist()).encode() + b"\0")
        return sha.hexdigest()

    def part(self, number: int) -> Iterator["FileImage | ShardImage"]:
        """Return the images of a part, not yet read."""
        start = number * self.part_size
        return (FileImage(path, self.directory) for path in self.paths[start : start + self.part_size].to_pylist())


@dataclass(frozen=True)
class ImageShards:
    """All images of a shard set."""

    uri: str
    manifest: Manifest
    others: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images."""
        return self.manifest.num_examples

    @property
    def convert(self) -> bool:
        """Whether images of the set that are not plain RGB are converted."""
        return self.manifest.convert_images

    @property
    def num_parts(self) -> int:
        """Number of shards, each of which is a part."""
        return len(self.manifest.shards)

    @property
    def digest(self) -> str:
        """Digest of the set's manifest."""
        return self.manifest.digest

    def part(self, number: int) -> Iterator["FileImage | ShardImage"]:
        """Return the images of a shard, which is read one row group at a time."""
        for group in range(self.manifest.row_groups(number)):
            table = read_rows(self.uri, self.manifest, number, [group], ("id", "image"))
            for name, image in zip(table["id"].to_pylist(), table["image"], strict=True):
                yield ShardImage(name, image.as_py())


@dataclass(frozen=True)
class FileImage:
    """An image file."""

    name: str
    directory: str

    def read(self) -> EncodedImage:
        """Read it.

        Raises:
            DataError: The store cannot be reached or refuses access.
        """
        path = os.path.join(self.directory, self.name) if store.is_local(self.name) else self.name
        try:
            return EncodedImage(self.name, store.read_bytes(path))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return EncodedImage(self.name, None, "no such file")
            if isinstance(error.__cause__, PermissionError):
                return EncodedImage(self.name, None, "permission denied")
            raise


@dataclass(frozen=True)
class ShardImage:
    """An image of a shard."""

    name: str
    data: bytes

    def read(self) -> EncodedImage:
        """Return the bytes that were read with its row group."""
        return EncodedImage(self.name, self.data)


Images = ImageFiles | ImageShards


def open_images(sources: Sequence[str]) -> Images:
    """List the images of files and folders, local, ``s3://`` or ``gs://``, or open one shard set.

    In a folder, every file below it with the ending of an image counts, except hidden files.

    Raises:
        ConfigError: No source, or a shard set together with another source.
        DataError: A source does not exist, or there is no image.
    """
    if not sources:
        raise ConfigError.of("images", "empty", "image files, folders of images, or a shard set", "give one")
    sources = [_plain(str(source)) for source in sources]
    sizes = store.file_sizes(sources)
    paths: list[str] = []
    others: Counter[str] = Counter()
    for source, size in zip(sources, sizes, strict=True):
        if size is not None:
            paths.append(source)
            continue
        if store.exists(store.join(source, MANIFEST)):
            if len(sources) > 1:
                given = f"{source} is a shard set, and there are {len(sources) - 1} other sources"
                raise ConfigError.of("images", given, "a shard set alone", "classify it by itself")
            return ImageShards(store.absolute(source), read_manifest(source))
        found = store.list_files(source)
        if not found and not store.exists(source):
            raise DataError(f"{source}: no such path; accepted: an image file, a folder of images, or a shard set")
        found = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
        images = [name for name in found if is_image(name)]
        others += others_by_ending(found)
        paths += [_plain(store.join(source, name)) for name in images]
    if not paths:
        found_others = f" ({named(others)})" if others else ""
        accepted = f"files ending in {' '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{sources[0]}: no image in it{found_others}; accepted: {accepted}; check the path")
    return ImageFiles(pa.array(paths, pa.large_string()), os.getcwd(), dict(others.most_common()))


def ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S], window: int) -> Iterator[T]:
    """Yield ``function(item)`` in order; at most ``window`` of them are running or finished and not yet taken."""
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def is_folder(source: str) -> bool:
    """Return whether a source is a local folder, or a URI in an object store without the ending of an image."""
    if store.is_local(source):
        return os.path.isdir(_plain(source))
    return not is_image(source.partition("?")[0].rpartition("/")[2])


def _plain(source: str) -> str:
    """Return a local path without ``file://``, ``~`` and ``./``; return a URI unchanged."""
    if not store.is_local(source):
        return source
    return os.path.normpath(os.path.expanduser(source.removeprefix("file://")))
