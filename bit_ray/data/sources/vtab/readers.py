"""Which reader opens which task."""

from collections.abc import Callable
from pathlib import Path

from bit_ray.data.sources.vtab import natural, specialized, structured
from bit_ray.data.sources.vtab.images import KnownSource
from bit_ray.data.sources.vtab.tasks import Task

Reader = Callable[[Task, Path, str], KnownSource]
"""Opens one part of a task's data set, as published: ``all``, ``train``, ``val`` or ``test``."""

READERS: dict[str, Reader] = {
    "caltech101": natural.open_caltech,
    "cifar100": natural.open_published,
    "dtd": natural.open_dtd,
    "oxford_flowers102": natural.open_published,
    "oxford_iiit_pet": natural.open_published,
    "sun397": natural.open_sun,
    "svhn": natural.open_svhn,
    "patch_camelyon": specialized.open_camelyon,
    "eurosat": specialized.open_eurosat,
    "resisc45": specialized.open_resisc,
    "diabetic_retinopathy": specialized.open_retinopathy,
    "clevr-count": structured.open_clevr,
    "clevr-distance": structured.open_clevr,
    "dmlab": structured.open_dmlab,
    "kitti-distance": structured.open_kitti,
    "dsprites-xpos": structured.open_dsprites,
    "dsprites-orientation": structured.open_dsprites,
    "smallnorb-azimuth": structured.open_smallnorb,
    "smallnorb-elevation": structured.open_smallnorb,
}
