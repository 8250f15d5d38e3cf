import pytest

from bit_ray.data.sources.vtab import derive as labels
from bit_ray.data.sources.vtab.tasks import TASKS, find_task
from bit_ray.errors import ConfigError, DataError

# The table of bit-facts section 7, typed by hand: group, classes, train/val/test, below 96x96, flip, crop.
TABLE = """
caltech101            natural      102   2754    306   6084 L y y
cifar100              natural      100  45000   5000  10000 S y y
dtd                   natural       47   1880   1880   1880 L y y
oxford_flowers102     natural      102   1020   1020   6149 L y y
oxford_iiit_pet       natural       37   2944    736   3669 L y y
sun397                natural      397  76128  10875  21750 L y y
svhn                  natural       10  65931   7326  26032 S y y
patch_camelyon        specialized    2 262144  32768  32768 L y y
eurosat               specialized   10  16200   5400   5400 S y y
resisc45              specialized   45  18900   6300   6300 L y y
diabetic_retinopathy  specialized    5  35126  10906  42670 L y y
clevr-count           structured     8  63000   7000  15000 L y n
clevr-distance        structured     6  63000   7000  15000 L y n
dmlab                 structured     6  65550  22628  22735 L y n
kitti-distance        structured     4   6347    423    711 L y n
dsprites-xpos         structured    16 589824  73728  73728 S n n
dsprites-orientation  structured    16 589824  73728  73728 S n y
smallnorb-azimuth     structured    18  24300  12150  12150 L n y
smallnorb-elevation   structured     9  24300  12150  12150 L y y
"""
# Sizes of what publishers give, from which the carved splits must come out as above.
PUBLISHED = {
    "caltech101": {"train": 3060, "test": 6084},
    "cifar100": {"train": 50_000, "test": 10_000},
    "oxford_iiit_pet": {"train": 3680, "test": 3669},
    "svhn": {"train": 73_257, "test": 26_032},
    "eurosat": {"all": 27_000},
    "resisc45": {"all": 31_500},
    "clevr-count": {"train": 70_000, "val": 15_000},
    "clevr-distance": {"train": 70_000, "val": 15_000},
    "dsprites-xpos": {"all": 737_280},
    "dsprites-orientation": {"all": 737_280},
    "smallnorb-azimuth": {"train": 24_300, "test": 24_300},
    "smallnorb-elevation": {"train": 24_300, "test": 24_300},
}


def test_the_tasks_are_those_of_the_table():
    rows = [line.split() for line in TABLE.strip().splitlines()]
    assert [task.name for task in TASKS] == [row[0] for row in rows]
    for task, row in zip(TASKS, rows, strict=True):
        assert [task.group, task.num_classes, *task.sizes] == [row[1], *map(int, row[2:6])]
        small, flip, crop = (
            "S" if task.small_images else "L",
            *("yn"[not on] for on in (task.random_flip, task.random_crop)),
        )
        assert [small, flip, crop] == row[6:]
    assert [sum(task.group == group for task in TASKS) for group in ("natural", "specialized", "structured")] == [
        7,
        4,
        8,
    ]


def test_carved_splits_have_the_published_sizes_and_do_not_overlap():
    for name, parts in PUBLISHED.items():
        task = find_task(name)
        seen = {part: [] for part in parts}
        for split, size in zip(("train", "val", "test"), task.sizes, strict=True):
            cut = task.cut(split)
            first, end = cut.bounds(parts[cut.part])
            assert end - first == size, (name, split)
            seen[cut.part].append((first, end))
        for part, ranges in seen.items():
            ends = sorted(ranges)
            assert ends[0][0] == 0
            assert ends[-1][1] == parts[part]
            assert all(a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False)), name


def test_a_mistyped_task_is_one_line_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"tasks: clevr-cuont; accepted: caltech101, .*; did you mean clevr-count\?"):
        find_task("clevr-cuont")


@pytest.mark.parametrize(("objects", "label"), [(3, 0), (4, 1), (5, 2), (6, 3), (7, 4), (8, 5), (9, 6), (10, 7)])
def test_clevr_counts(objects, label):
    assert labels.clevr_count(objects) == label


# A depth on a threshold belongs to the class below: the benchmark asks for thresholds strictly below the depth.
@pytest.mark.parametrize(
    ("depth", "label"),
    [
        (0.001, 0), (7.999, 0), (8.0, 0), (8.001, 1), (8.5, 1), (8.501, 2), (9.0, 2), (9.001, 3),
        (9.5, 3), (9.501, 4), (10.0, 4), (10.001, 5), (13.7, 5), (100.0, 5),
    ],
)  # fmt: skip
def test_clevr_distances(depth, label):
    assert labels.clevr_distance([depth + 3, depth, depth + 1]) == label


@pytest.mark.parametrize(
    ("objects", "label"),
    [
        ([("Car", -99.9)], 0),
        ([("Car", 8.0)], 0),
        ([("Car", 8.01)], 1),
        ([("Van", 20.0)], 1),
        ([("Truck", 20.01)], 2),
        ([("Truck", 999.0)], 2),
        ([("Truck", 999.1)], 3),
        ([], 3),
        ([("Pedestrian", 5.0), ("Cyclist", 2.0), ("Tram", 3.0), ("Misc", 1.0), ("Person_sitting", 1.0)], 3),
        ([("DontCare", -1000.0)], 3),
        ([("Pedestrian", 5.0), ("Car", 30.0), ("Van", 12.0)], 1),
    ],
)
def test_kitti_distances(objects, label):
    assert labels.kitti_distance(objects) == label


def test_dsprites_places_two_to_a_class():
    expected = [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
        6,
        6,
        7,
        7,
        8,
        8,
        9,
        9,
        10,
        10,
        11,
        11,
        12,
        12,
        13,
        13,
        14,
        14,
        15,
        15,
    ]
    assert [labels.dsprites_xpos(i) for i in range(32)] == expected


def test_dsprites_orientations_two_and_a_half_to_a_class():
    expected = [
        0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 7,
        8, 8, 8, 9, 9, 10, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 14, 14, 15, 15,
    ]  # fmt: skip
    assert [labels.dsprites_orientation(i) for i in range(40)] == expected


def test_smallnorb_poses_svhn_digits_and_the_rest():
    assert [labels.smallnorb_azimuth(value) for value in range(0, 36, 2)] == list(range(18))
    assert [labels.smallnorb_elevation(value) for value in range(9)] == list(range(9))
    assert [labels.svhn_digit(value) for value in range(1, 11)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert [labels.retinopathy_level(value) for value in range(5)] == list(range(5))
    assert [labels.dmlab_label(value) for value in range(6)] == list(range(6))


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (labels.clevr_count, 2), (labels.clevr_count, 11), (labels.clevr_distance, []), (labels.clevr_distance, [0.0]),
        (labels.clevr_distance, [100.1]), (labels.kitti_distance, [("Car", -100.0)]), (labels.dsprites_xpos, 32),
        (labels.dsprites_xpos, -1), (labels.dsprites_orientation, 40), (labels.smallnorb_azimuth, 7),
        (labels.smallnorb_azimuth, 36), (labels.smallnorb_elevation, 9), (labels.svhn_digit, 0),
        (labels.svhn_digit, 11), (labels.retinopathy_level, 5), (labels.dmlab_label, 6), (labels.dmlab_label, -1),
    ],
)  # fmt: skip
def test_what_no_publisher_writes_is_refused_in_one_line(function, value):
    with pytest.raises(DataError, match="accepted: ") as caught:
        function(value)
    assert "\n" not in str(caught.value)
