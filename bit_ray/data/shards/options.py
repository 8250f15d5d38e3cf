"""How a shard set is written, as settings; imports nothing slow, so that ``--help`` is fast."""

from dataclasses import dataclass
from typing import Literal

from bit_ray.data.sources.base import ReadOptions
from bit_ray.errors import ConfigError

MIN_SHORTER_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How examples become the rows of a shard."""

    convert_images: bool = False
    """Readers convert grayscale, CMYK, 16-bit, alpha, palette and animated images to 8-bit RGB."""
    upright: bool = False
    """Turn images that a camera stored on their side, as their EXIF orientation says; they are encoded again, as JPEG
    of quality 95. Without it the orientation is ignored, as in the paper's sets."""
    on_bad: Literal["error", "skip"] = "error"
    """Bad images end the command, or are left out and listed in skipped.json next to the manifest."""
    seekable: bool = False
    """Give JPEG files restart markers, so that training decodes less of them: no loss, the same pixels. Progressive
    files become baseline; what cannot have markers stays as it is."""
    shorter_side: int | None = None
    """Re-encode larger images with a shorter side of this many pixels, usually 256 to 512, as JPEG of quality 90.
    Faster to train from, but crops have fewer pixels than the paper's."""
    row_group_size: int = 64
    """Images that are read together."""


@dataclass(frozen=True, kw_only=True)
class WriteOptions(PackOptions, ReadOptions):
    """How a source is read and becomes a shard set."""

    shard_examples: int | None = None
    """Images in a shard; without it a sixteenth of the set, at most 4096."""
    seed: int = 0
    """Seed of the order in which the shards mix the source."""
    num_workers: int = 0
    """Ray tasks that write a shard each, here or on the cluster of RAY_ADDRESS; 0: this process alone."""

    def __post_init__(self) -> None:
        for name in ("row_group_size", "shard_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(name, value, "1 or more")
        if self.on_bad not in ("error", "skip"):
            raise ConfigError.of("on_bad", self.on_bad, "error, skip", "choose one")
        if self.shorter_side is not None and self.shorter_side < MIN_SHORTER_SIDE:
            accepted = f"{MIN_SHORTER_SIDE} pixels or more, usually 256 to 512"
            raise ConfigError.of("shorter_side", self.shorter_side, accepted, "raise it")
