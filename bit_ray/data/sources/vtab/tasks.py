"""The 19 tasks of VTAB-1k as data (Zhai et al. 2019; big_transfer paper §3.2 and App. F; task_adaptation:data/)."""

from dataclasses import dataclass, replace
from typing import Literal

from bit_ray.errors import ConfigError, did_you_mean

Group = Literal["natural", "specialized", "structured"]
Split = Literal["train", "val", "test"]
GROUPS: tuple[Group, ...] = ("natural", "specialized", "structured")

NUM_TRAIN, NUM_VAL = 800, 200
"""Training and validation examples of every task; the final fit is on both (task_adaptation: train800val200)."""


@dataclass(frozen=True)
class Cut:
    """A range of one part of the publisher's data, in per cent."""

    part: Literal["all", "train", "val", "test"]
    """Part as published; ``all`` if the publisher has no split."""
    start: int = 0
    """Per cent of the part before the range."""
    stop: int = 100
    """Per cent up to its end."""

    def bounds(self, num_examples: int) -> tuple[int, int]:
        """Start and end index of the range in a part of this size, rounded down."""
        return num_examples * self.start // 100, num_examples * self.stop // 100


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: what is classified, and how the HyperRule treats it."""

    name: str
    """As in the names of the published weights."""
    group: Group
    """Natural, specialized or structured."""
    num_classes: int
    """Classes."""
    sizes: tuple[int, int, int]
    """Published numbers of training, validation and test images."""
    cuts: tuple[Cut, Cut, Cut]
    """Where the three splits come from."""
    small_images: bool = False
    """Images of fewer than 96x96 pixels, which the HyperRule trains at 128. A run uses the size of the actual data."""
    random_flip: bool = True
    """Off if left and right matter (paper App. F)."""
    random_crop: bool = True
    """Off if position or size matters (paper App. F)."""
    folder: str
    """Folder of the data set below the data folder."""
    files: str
    """Content of that folder."""
    url: str
    """Where it is published."""

    def cut(self, split: Split) -> Cut:
        """Return where a split comes from."""
        return self.cuts[("train", "val", "test").index(split)]

    @property
    def test_is_published(self) -> bool:
        """Whether its images are known from published data: not for Caltech-101, whose split was drawn."""
        return self.name != "caltech101"

    @property
    def fetch(self) -> str:
        """Where to fetch the files and where to put them, as the end of an error message."""
        return f"fetch from {self.url} into the folder {self.folder} of the data folder"


def _carved(percent: int, test: str = "test") -> tuple[Cut, Cut, Cut]:
    """Validation is the end of the training part."""
    return Cut("train", 0, percent), Cut("train", percent, 100), Cut(test)  # type: ignore[arg-type]


def _of_all(train: int, val: int) -> tuple[Cut, Cut, Cut]:
    """No published split: all three are ranges of the full set."""
    return Cut("all", 0, train), Cut("all", train, train + val), Cut("all", train + val, 100)


_OFFICIAL = Cut("train"), Cut("val"), Cut("test")
_NORB = Cut("train"), Cut("test", 0, 50), Cut("test", 50, 100)

_CLEVR = Task(
    name="clevr-count",
    group="structured",
    num_classes=8,
    sizes=(63_000, 7_000, 15_000),
    cuts=_carved(90, "val"),
    random_crop=False,
    folder="clevr",
    files="CLEVR_v1.0.zip, or CLEVR_v1.0/ unpacked",
    url="https://cs.stanford.edu/people/jcjohns/clevr/",
)
_DSPRITES = Task(
    name="dsprites-xpos",
    group="structured",
    num_classes=16,
    sizes=(589_824, 73_728, 73_728),
    cuts=_of_all(80, 10),
    small_images=True,
    random_flip=False,
    random_crop=False,
    folder="dsprites",
    files="dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
    url="https://github.com/google-deepmind/dsprites-dataset",
)
_SMALLNORB = Task(
    name="smallnorb-azimuth",
    group="structured",
    num_classes=18,
    sizes=(24_300, 12_150, 12_150),
    cuts=_NORB,
    random_flip=False,
    folder="smallnorb",
    files="the six smallnorb-5x...-{training,testing}-{dat,cat,info}.mat, also as .mat.gz",
    url="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
)

TASKS: tuple[Task, ...] = (
    Task(
        name="caltech101",
        group="natural",
        num_classes=102,
        sizes=(2754, 306, 6084),
        cuts=_carved(90),
        folder="caltech101",
        files="101_ObjectCategories.tar.gz, or 101_ObjectCategories/ unpacked",
        url="https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    Task(
        name="cifar100",
        group="natural",
        num_classes=100,
        sizes=(45_000, 5_000, 10_000),
        cuts=_carved(90),
        small_images=True,
        folder="cifar100",
        files="cifar-100-binary.tar.gz, or unpacked",
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    Task(
        name="dtd",
        group="natural",
        num_classes=47,
        sizes=(1880, 1880, 1880),
        cuts=_OFFICIAL,
        folder="dtd",
        files="dtd-r1.0.1.tar.gz, or dtd/ unpacked",
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
    Task(
        name="oxford_flowers102",
        group="natural",
        num_classes=102,
        sizes=(1020, 1020, 6149),
        cuts=_OFFICIAL,
        folder="oxford_flowers102",
        files="102flowers.tgz, imagelabels.mat and setid.mat",
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    Task(
        name="oxford_iiit_pet",
        group="natural",
        num_classes=37,
        sizes=(2944, 736, 3669),
        cuts=_carved(80),
        folder="oxford_iiit_pet",
        files="images.tar.gz and annotations.tar.gz",
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    Task(
        name="sun397",
        group="natural",
        num_classes=397,
        sizes=(76_128, 10_875, 21_750),
        cuts=_OFFICIAL,
        folder="sun397",
        files="SUN397/ unpacked from SUN397.tar.gz, and next to it sun397_tfds_{tr,va,te}.txt of TensorFlow Datasets",
        url="https://vision.princeton.edu/projects/2010/SUN/",
    ),
    Task(
        name="svhn",
        group="natural",
        num_classes=10,
        sizes=(65_931, 7_326, 26_032),
        cuts=_carved(90),
        small_images=True,
        folder="svhn",
        files="train_32x32.mat and test_32x32.mat",
        url="http://ufldl.stanford.edu/housenumbers/",
    ),
    Task(
        name="patch_camelyon",
        group="specialized",
        num_classes=2,
        sizes=(262_144, 32_768, 32_768),
        cuts=_OFFICIAL,
        folder="patch_camelyon",
        files="the six camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, unpacked from their .gz",
        url="https://github.com/basveeling/pcam",
    ),
    Task(
        name="eurosat",
        group="specialized",
        num_classes=10,
        sizes=(16_200, 5_400, 5_400),
        cuts=_of_all(60, 20),
        small_images=True,
        folder="eurosat",
        files="EuroSAT.zip (RGB), or its class folders unpacked below 2750/",
        url="https://github.com/phelber/EuroSAT",
    ),
    Task(
        name="resisc45",
        group="specialized",
        num_classes=45,
        sizes=(18_900, 6_300, 6_300),
        cuts=_of_all(60, 20),
        folder="resisc45",
        files="NWPU-RESISC45/ unpacked from NWPU-RESISC45.rar",
        url="https://gcheng-nwpu.github.io/#Datasets",
    ),
    Task(
        name="diabetic_retinopathy",
        group="specialized",
        num_classes=5,
        sizes=(35_126, 10_906, 42_670),
        cuts=_OFFICIAL,
        folder="diabetic_retinopathy",
        files="train/ and test/ with the .jpeg files, trainLabels.csv and retinopathy_solution.csv",
        url="https://www.kaggle.com/c/diabetic-retinopathy-detection/data",
    ),
    _CLEVR,
    replace(_CLEVR, name="clevr-distance", num_classes=6),
    Task(
        name="dmlab",
        group="structured",
        num_classes=6,
        sizes=(65_550, 22_628, 22_735),
        cuts=_OFFICIAL,
        random_crop=False,
        folder="dmlab",
        files="dmlab-{train,validation,test}.tfrecord* unpacked from dmlab.tar.gz",
        url="https://storage.googleapis.com/dmlab-vtab/dmlab.tar.gz",
    ),
    Task(
        name="kitti-distance",
        group="structured",
        num_classes=4,
        sizes=(6347, 423, 711),
        cuts=_OFFICIAL,
        random_crop=False,
        folder="kitti",
        files="data_object_image_2.zip, data_object_label_2.zip and devkit_object.zip",
        url="https://www.cvlibs.net/datasets/kitti/eval_object.php",
    ),
    _DSPRITES,
    replace(_DSPRITES, name="dsprites-orientation", random_crop=True),
    _SMALLNORB,
    replace(_SMALLNORB, name="smallnorb-elevation", num_classes=9, random_flip=True),
)
_BY_NAME = {task.name: task for task in TASKS}


def find_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: No such task.
    """
    if name not in _BY_NAME:
        raise ConfigError.of("tasks", name, f"{', '.join(_BY_NAME)}{did_you_mean(name, _BY_NAME)}", "choose one")
    return _BY_NAME[name]
