"""Where the files of a data set are, and how to get missing ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bit_ray.download import download
from bit_ray.errors import DataError


class Download(NamedTuple):
    """A file that its publisher offers without an account."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]

    def fetch(self, target: Path) -> None:
        """Download it.

        Raises:
            DataError: It cannot be downloaded, or is not the published file.
            ConfigError: Another process is downloading it.
        """
        try:
            download(self.url, target, md5=self.md5)
        except OSError as error:
            raise DataError(
                f"{self.url}: cannot be downloaded: {error}; check the network, or fetch it elsewhere and put it at "
                f"{target}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class PublishedFiles:
    """The user's folder of data sets, for one of the sets."""

    dataset: str
    folder: Path
    how_to_get: str
    """What to fetch, for messages."""
    downloads: Callable[[], Sequence[Download]] | None = None
    download: bool = False
    """Whether missing files may be downloaded."""
    class_names: tuple[str, ...] | None = None
    """The class list to follow, for a set that has no official one."""

    def find(self, *names: str) -> Path:
        """Return the first of these files or folders that exists, in the set's own folder or in the common one.

        With ``download`` the first one that the publisher offers is fetched if none exists.

        Raises:
            DataError: None of them exists; the message says what to fetch and where to put it.
        """
        if found := self.look(*names):
            return found
        offered = {file.name: file for file in self.downloads()} if self.downloads else {}
        file = next((offered[name] for name in names if name in offered), None)
        if self.download and file is not None:
            target = self.folder / self.dataset / file.name
            file.fetch(target)
            return target
        own = self.folder / self.dataset
        how = self.how_to_get or "fetch " + " and ".join(file.url for file in offered.values())
        text = f"{self.dataset}: {file.name if file else names[0]} is not in {own}; {how}, and put it there unchanged"
        if file is not None:
            text += ", or give --download (download=True) if there is a network"
        elif self.download:
            text += "; --download cannot fetch it"
        raise DataError(text)

    def look(self, *names: str) -> Path | None:
        """Return the first of these files or folders that exists, or None."""
        paths = (folder / name for name in names for folder in (self.folder / self.dataset, self.folder))
        return next((path for path in paths if path.exists()), None)
