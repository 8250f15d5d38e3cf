"""The safetensors files of a saved model or a checkpoint, by content."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bit_ray.config import check_digest, check_num_bytes, is_plain
from bit_ray.errors import ConfigError, ModelError
from bit_ray.store import file_sha256
from bit_ray.weights.location import DESCRIPTION_FILE

WEIGHTS_FILE = "model.safetensors"
MAX_PARTS = 10_000
"""Most files of weights in parts."""
_OF_PYTORCH = {"format": "pt"}


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file, by content."""

    file: str
    """Name of the file inside the package; of weights in parts, of the file that they would make."""
    sha256: str
    """SHA-256 of its bytes, hex; of weights in parts, of the digests of the parts."""
    num_bytes: int
    """Its size, bytes; of weights in parts, of all of them."""

    def __post_init__(self) -> None:
        check_digest("sha256", self.sha256)
        check_num_bytes("num_bytes", self.num_bytes)
        name = self.file
        if name in ("", ".", "..", DESCRIPTION_FILE) or {"/", "\\"} & {*name} or len(name) > 255 or not is_plain(name):
            accepted = "a plain file name inside the package"
            raise ConfigError.of("file", repr(name[:80]), accepted, "write the package again")

    @classmethod
    def of(cls, path: Path) -> Self:
        """Describe a file."""
        return cls(file=path.name, sha256=file_sha256(path), num_bytes=path.stat().st_size)


@dataclass(frozen=True, kw_only=True)
class Weights(TensorFile):
    """The weights of a package."""

    parts: tuple[TensorFile, ...] = ()
    """The files in which the tensors are, if it is not one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            return
        if len(self.parts) > MAX_PARTS:
            raise ConfigError.of("parts", f"{len(self.parts):,} files", f"at most {MAX_PARTS:,}", "save it again")
        if len({part.file for part in self.parts}) < len(self.parts):
            raise ConfigError.of("parts", "a file stands there twice", "each once", "save it again")
        if (self.sha256, self.num_bytes) != (_joint_digest(self.parts), sum(part.num_bytes for part in self.parts)):
            raise ConfigError.of("parts", "other files than sha256 and num_bytes say", "the same", "save it again")

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """The files in which the tensors are."""
        return self.parts or (self,)

    @classmethod
    def in_parts(cls, parts: tuple[TensorFile, ...]) -> Self:
        """Describe weights of which each file has some tensors."""
        num_bytes = sum(part.num_bytes for part in parts)
        return cls(file=WEIGHTS_FILE, sha256=_joint_digest(parts), num_bytes=num_bytes, parts=parts)


def _joint_digest(parts: tuple[TensorFile, ...]) -> str:
    return hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _OF_PYTORCH) -> None:
    """Write tensors into a safetensors file.

    Raises:
        OSError: It cannot be written.
    """
    # Contiguous: safetensors refuses the strides of channels_last.
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata=dict(metadata))
    except SafetensorError as error:  # so is that of a full disk
        if (system := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(system[1]), os.strerror(int(system[1])), str(path)) from None


def verify_weights(directory: Path, files: tuple[TensorFile, ...], document: str = DESCRIPTION_FILE) -> None:
    """Compare local files with the sizes and digests that a document of their directory has of them.

    Raises:
        ModelError: One is missing or differs.
    """
    for file in files:
        path = directory / file.file
        try:
            num_bytes = path.stat().st_size
            # The size first: it detects a truncated file without reading gigabytes.
            if num_bytes != file.num_bytes:
                raise ModelError(
                    f"{path}: {num_bytes} bytes; accepted: {file.num_bytes}, as in {document}; fetch the model again"
                )
            digest = file_sha256(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
        if digest != file.sha256:
            raise ModelError(
                f"{path}: SHA-256 {digest[:12]}...; accepted: {file.sha256[:12]}..., as in {document}; the weights "
                "were changed or damaged: fetch the model again"
            )
