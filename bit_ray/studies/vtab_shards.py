"""The shard sets of the tasks of VTAB-1k: written if they are missing, and what they would have before that."""

import numpy as np

from bit_ray import store
from bit_ray.claim import CLAIM_FILE, claimed
from bit_ray.data.images.decode import decode_image
from bit_ray.data.shards.manifest import MANIFEST, read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.sources.vtab.index import Index, fits, load_index, read_index, write_index
from bit_ray.data.sources.vtab.splits import draw_index, open_task
from bit_ray.data.sources.vtab.tasks import Task
from bit_ray.errors import DataError
from bit_ray.studies.vtab_config import VtabConfig

# Writing the largest task's shards takes hours.
_WAIT_S = 86400.0


def training_images(task: Task, config: VtabConfig) -> tuple[int, tuple[int, int], str]:
    """Number and median size of the training images, and what they are."""
    learnt, scored = _splits(config)
    root = _shards(task, config)
    if all(store.exists(store.join(root, name, MANIFEST)) for name in (learnt, scored)):
        manifest = read_manifest(store.join(root, learnt))
        return manifest.num_examples, manifest.median_image_size, f"shards in {root}"
    data = open_task(task, config.data_dir)
    index = read_index(config.index, task) if config.index else None
    index = index or draw_index(data, config.subset_seed, config.num_train, config.num_val)
    source = data.subset(learnt, index)
    few = source.part(np.arange(min(9, len(source))))
    sizes = [decode_image(one.image, convert=True).shape[:2] for one in few if isinstance(one, Example)]
    height, width = np.median(np.array(sizes), axis=0).astype(int).tolist()
    return len(source), (height, width), "; ".join(filter(None, (index.origin, data.missing.partition(": ")[2])))


def prepare_shards(task: Task, config: VtabConfig) -> tuple[tuple[str, str], Index]:
    """Return the shard sets to learn from and to score, written if they are missing, and the index they follow.

    Studies that share a folder of shards wait for each other here.

    Raises:
        DataError: data is missing or damaged, an index does not fit, or the shards follow another one.
        ConfigError: another study has been writing them for a day.
    """
    root = _shards(task, config)
    if all(store.exists(store.join(root, name, MANIFEST)) for name in _splits(config)):
        return _prepare_shards(task, config, root)
    busy = f"{task.name}: {root} is being written"
    with claimed(store.join(root, CLAIM_FILE), busy, remedy="wait for it, or choose other shards", wait_s=_WAIT_S):
        return _prepare_shards(task, config, root)


def _prepare_shards(task: Task, config: VtabConfig, root: str) -> tuple[tuple[str, str], Index]:
    index_uri = store.join(root, "index.json")
    uris = [store.join(root, name) for name in _splits(config)]
    listed = read_index(config.index, task) if config.index else None
    stored = load_index(index_uri, task) if store.exists(index_uri) else None
    if stored is not None:
        if listed:
            same = (stored.train, stored.val, stored.test) == (listed.train, listed.val, listed.test)
        else:
            same = fits(stored, config.subset_seed, config.num_train, config.num_val)
        if not same:
            raise DataError(
                f"{task.name}: {index_uri} has other examples than asked for ({stored.statement}); accepted: the same "
                "index, seed and numbers; choose another folder of shards"
            )
    written = all(store.exists(store.join(uri, MANIFEST)) for uri in uris)
    if written and stored is None and listed is None:  # by bit-ray shards write
        return (uris[0], uris[1]), Index(task=task.name, origin=f"as in the shards {root}", train=(), val=())
    if stored is None or not written:
        data = open_task(task, config.data_dir)
        stored = stored or listed or draw_index(data, config.subset_seed, config.num_train, config.num_val)
        for name, uri in zip(_splits(config), uris, strict=True):
            source = data.subset(name, stored)
            if name == _splits(config)[0]:
                write_index(stored, index_uri)
            write_shards(source, uri, name=f"vtab:{task.name}:{name}", convert_images=True)
    return (uris[0], uris[1]), stored


def _shards(task: Task, config: VtabConfig) -> str:
    """Folder of the task's shard sets."""
    return store.join(config.shards or store.join(config.storage, "vtab"), task.name)


def _splits(config: VtabConfig) -> tuple[str, str]:
    """The training examples, and the images to score."""
    return ("train800val200", "test") if config.protocol == "test" else ("train800", "val200")
