"""Weights by name: the authors' published files, and models on the Hugging Face Hub, fetched once into the cache.

What comes is untrusted: it is compared with the digest that its server states, and read as any other weights are (see
`bit_ray.weights.read`).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from bit_ray.download import download
from bit_ray.errors import ModelError, brief, did_you_mean
from bit_ray.locks import whole
from bit_ray.store import cache_folder, file_sha256

BUCKET = "https://storage.googleapis.com/bit_models"
"""The authors' public folder (github.com/google-research/big_transfer, README)."""
# Parameters without the head.
_SIZES = {
    "R50x1": 23_500_352, "R50x3": 211_174_080, "R101x1": 42_492_480, "R101x3": 381_789_888, "R152x2": 232_238_208,
    "R152x4": 928_340_224,
}  # fmt: skip
# Of timm's evaluation of these files on ImageNet's validation images, one view of 448 pixels (480 for R152x4):
# pytorch-image-models, results/results-imagenet.csv.
_TOP_1 = {
    "R50x1": 0.80386, "R101x1": 0.82332, "R50x3": 0.83982, "R101x3": 0.84430, "R152x2": 0.84468, "R152x4": 0.84936,
}  # fmt: skip
_HUB = "hf://"
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
# Of a repository, the first group of these that it has, and what describes it.
_HUB_WEIGHTS = (("model.safetensors",), ("model.safetensors.index.json",), ("pytorch_model.bin",))
_HUB_CONFIGS = ("config.json", "preprocessor_config.json")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """A file that the authors publish."""

    name: str
    """As ``--init`` takes it, such as ``bit_m_r50x1``."""
    file: str
    model: str
    trained_on: str
    num_classes: int
    image_size: int
    """Side of the views that it was trained on last, pixels."""
    top_1: float | None = None
    """On ImageNet's validation images, where the head is of its classes and a figure is published."""

    @property
    def num_bytes(self) -> int:
        """Size of its float32 tensors; the file has a little more."""
        num_features = 2048 * int(self.model.partition("x")[2])
        return 4 * (_SIZES[self.model] + (num_features + 1) * self.num_classes)

    @property
    def path(self) -> Path:
        """Where it is kept once it is fetched."""
        return cache_folder() / "weights" / self.file

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{os.environ.get('BIT_RAY_WEIGHTS_URL') or BUCKET}/{self.file}"


def known_weights() -> list[KnownWeights]:
    """Return the authors' general weights: BiT-S and BiT-M, and BiT-M fine-tuned on ImageNet."""
    found = []
    for size in _SIZES:
        low = size.lower()
        found += [
            KnownWeights(
                name=f"bit_s_{low}", file=f"BiT-S-{size}.npz", model=size, trained_on="ImageNet (ILSVRC-2012)",
                num_classes=1000, image_size=224,
            ),
            KnownWeights(
                name=f"bit_m_{low}", file=f"BiT-M-{size}.npz", model=size, trained_on="ImageNet-21k",
                num_classes=21843, image_size=224,
            ),
            KnownWeights(
                name=f"bit_m_{low}_ilsvrc2012", file=f"BiT-M-{size}-ILSVRC2012.npz", model=size,
                trained_on="ImageNet-21k, then ImageNet", num_classes=1000, image_size=480, top_1=_TOP_1[size],
            ),
        ]  # fmt: skip
    return sorted(found, key=lambda weights: weights.name)


def fetch_by_name(name: str) -> Path | None:
    """Return the local file or folder of weights that have a name, fetched if need be; None if it is not such a name.

    Args:
        name: A name of `known_weights` (``-`` counts as ``_``, capitals as small letters), ``timm/NAME``, or
            ``hf://ORG/NAME``, each of the latter with ``@REVISION`` if wanted.

    Raises:
        ModelError: There is no such model, it cannot be fetched, or it is not what its server says it is.
    """
    if not is_name(name):
        return None
    names = {weights.name: weights for weights in known_weights()}
    weights = names.get(_plain(name))
    return _from_bucket(weights) if weights else _from_hub(name)


def is_name(name: str) -> bool:
    """Return whether weights are meant by their name, not by their path or URI.

    Raises:
        ModelError: There are no weights of this name.
    """
    if name.startswith(_HUB):
        return True
    if "://" in name or os.path.exists(name):
        return False
    wanted, names = _plain(name), [weights.name for weights in known_weights()]
    if name.startswith("timm/") or wanted in names:
        return True
    if wanted.startswith(("bit_s_", "bit_m_", "bit_l_")) and not set(name) & set("/."):
        hint = did_you_mean(wanted, names, "did you mean ", "? ")
        raise ModelError(f"{brief(name)}: unknown weights; {hint}see bit-ray models known")
    return False


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _from_bucket(weights: KnownWeights) -> Path:
    path = weights.path
    if path.is_file():
        return path
    try:
        download(weights.url, path, wait_s=3600.0)
    except OSError as error:
        raise ModelError(
            f"{weights.name}: cannot be fetched from {weights.url} ({error}); accepted: a connection, or the file at "
            f"{path}; download it elsewhere and put it there"
        ) from None
    return path


def _from_hub(name: str) -> Path:
    """Return a folder with the config and the weights of a repository of the Hugging Face Hub."""
    wanted = name.removeprefix(_HUB)
    match = _REPOSITORY.fullmatch(wanted)
    if match is None:
        raise ModelError(f"{brief(name)}: not a model of the Hub; accepted: hf://ORG/NAME or hf://ORG/NAME@REVISION")
    repository, revision = match["repository"], match["revision"]
    import requests
    from huggingface_hub import HfApi, get_token

    folder = cache_folder() / "hub"
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        # One question instead of the library's own, which tries again for half a minute where there is no connection.
        api_url = f"{hub.endpoint}/api/models/{repository}" + (f"/revision/{revision}" if revision else "")
        headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
        with requests.get(api_url, headers=headers, timeout=_TIMEOUT_S) as answer:
            answer.raise_for_status()
            about = answer.json()
        found = [str(each["rfilename"]) for each in about["siblings"]]
        weights = next((group for group in _HUB_WEIGHTS if set(group) <= set(found)), None)
        if weights is None or "config.json" not in found:
            kinds = ", ".join(group[0] for group in _HUB_WEIGHTS)
            raise ModelError(f"{name}: no BiT model; accepted: a repository with config.json and one of {kinds}")
        files = [config for config in _HUB_CONFIGS if config in found] + list(weights)
        if weights[0].endswith(".index.json"):
            files += [each for each in found if re.fullmatch(r"model-\d+-of-\d+\.safetensors", each)]
        commit = str(about["sha"])
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ModelError(f"{name}: the Hub names no commit; accepted: an answer of the Hub; check HF_ENDPOINT")
        paths = [Path(hub.hf_hub_download(repository, file, revision=commit, cache_dir=folder)) for file in files]
        _note(folder, repository, revision, paths[0].parent)
    except ModelError:
        raise
    except Exception as error:  # of three libraries
        if isinstance(error, requests.ConnectionError) and (kept := _kept(folder, repository, revision)) is not None:
            return kept
        raise ModelError(
            f"{name}: cannot be fetched from {hub.endpoint}/{repository} ({_reason(error)}); accepted: a model that "
            "the Hub has, and a connection; without one, download the repository elsewhere and give its folder"
        ) from None
    for path in paths:
        _check_digest(name, path)
    return paths[0].parent


def _noted(folder: Path, repository: str, revision: str | None) -> Path:
    name = f"{repository}@{revision or 'main'}".replace("/", "--")
    return folder / f"{name}.txt"


def _note(folder: Path, repository: str, revision: str | None, fetched: Path) -> None:
    """Note which folder a name meant, for a start without a connection."""
    with whole(_noted(folder, repository, revision)) as file:
        file.write_text(os.path.relpath(fetched, folder))


def _kept(folder: Path, repository: str, revision: str | None) -> Path | None:
    """Return the folder that the name meant when there was a connection."""
    try:
        kept = folder / _noted(folder, repository, revision).read_text()
    except (OSError, ValueError):
        return None
    inside = kept.resolve().is_relative_to(folder.resolve())
    return kept if inside and any((kept / group[0]).is_file() for group in _HUB_WEIGHTS) else None


def _reason(error: BaseException) -> str:
    """Return what went wrong in few words."""
    import requests

    if isinstance(error, requests.Timeout):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection to the server"
    return " ".join(str(error).split())[:200]


def _check_digest(name: str, path: Path) -> None:
    """Compare a large file with its name in the cache, which is the SHA-256 that the Hub states."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and file_sha256(blob) != blob.name:
        blob.unlink()
        stated = f"the SHA-256 that the Hub states, {blob.name[:12]}..."
        raise ModelError(f"{name}: {path.name} does not have {stated}; it was removed, start again")
