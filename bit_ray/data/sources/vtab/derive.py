"""Labels of the VTAB tasks that no publisher gives directly: pure functions of a data set's annotations of an image.

The thresholds and bins are those of the benchmark's own code (task_adaptation:data/clevr.py, kitti.py, dsprites.py,
smallnorb.py). Every bound is strict: a distance equal to a threshold belongs to the class below it.
"""

from collections.abc import Sequence

from bit_ray.errors import DataError

CLEVR_MIN_OBJECTS, CLEVR_MAX_OBJECTS = 3, 10
# Closest object, in the units of a scene's pixel_coords; the last one only closes the last class.
CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
# Metres; a distance above 999 means "no vehicle".
KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0
KITTI_VEHICLES = frozenset({"Car", "Van", "Truck"})
# SVHN calls the digit 0 ten.
_SVHN_ZERO = 10


def clevr_count(num_objects: int) -> int:
    """Class of a CLEVR scene by its number of objects, 3 to 10: the number minus 3.

    Raises:
        DataError: Fewer than 3 or more than 10 objects.
    """
    if not CLEVR_MIN_OBJECTS <= num_objects <= CLEVR_MAX_OBJECTS:
        raise DataError(f"objects: {num_objects} in a CLEVR scene; accepted: 3 to 10; check the scenes file")
    return num_objects - CLEVR_MIN_OBJECTS


def clevr_distance(depths: Sequence[float]) -> int:
    """Class of a CLEVR scene by the depth of its closest object: the last threshold below it.

    Args:
        depths: Third of the pixel_coords of each object.

    Raises:
        DataError: No object, or a closest one outside 0 to 100.
    """
    if not depths:
        raise DataError("objects: 0 in a CLEVR scene; accepted: 3 to 10; check the scenes file")
    nearest = min(depths)
    if not CLEVR_DISTANCES[0] < nearest <= CLEVR_DISTANCES[-1]:
        raise DataError(f"pixel_coords: depth {nearest}; accepted: above 0, up to 100; check the scenes file")
    return _last_below(CLEVR_DISTANCES, nearest)


def kitti_distance(objects: Sequence[tuple[str, float]]) -> int:
    """Class of a KITTI image by the distance of its closest car, van or truck: to 8 m, to 20 m, farther, none.

    Args:
        objects: Type and z of each labelled object, metres.

    Raises:
        DataError: A distance below -100 m.
    """
    nearest = min([z for kind, z in objects if kind in KITTI_VEHICLES], default=KITTI_NO_VEHICLE)
    nearest = min(nearest, KITTI_NO_VEHICLE)
    if not nearest > KITTI_DISTANCES[0]:  # also false for NaN
        raise DataError(f"location: z = {nearest} m; accepted: above -100; check the label file")
    return _last_below(KITTI_DISTANCES, nearest)


def dsprites_xpos(index: int) -> int:
    """Class of a dSprites image by horizontal position: 32 positions, two to a class."""
    return _checked("x position", index, 32) // 2


def dsprites_orientation(index: int) -> int:
    """Class of a dSprites image by orientation: 40 of them, two and a half to a class."""
    return _checked("orientation", index, 40) * 2 // 5


def smallnorb_azimuth(value: int) -> int:
    """Class of a smallNORB image by azimuth, which the publisher writes as 0, 2, 4 to 34.

    Raises:
        DataError: An odd azimuth or one out of range.
    """
    if value % 2:
        raise DataError(f"azimuth: {value}; accepted: even numbers from 0 to 34; check the info file")
    return _checked("azimuth", value, 36) // 2


def smallnorb_elevation(value: int) -> int:
    """Class of a smallNORB image by elevation, 0 to 8."""
    return _checked("elevation", value, 9)


def svhn_digit(value: int) -> int:
    """Digit of an SVHN image, whose publisher writes 10 for the digit 0.

    Raises:
        DataError: A label outside 1 to 10.
    """
    if not 1 <= value <= _SVHN_ZERO:
        raise DataError(f"y: {value}; accepted: 1 to 10, where 10 is the digit 0; check the .mat file")
    return value % _SVHN_ZERO


def retinopathy_level(value: int) -> int:
    """Severity of a retinopathy, 0 to 4."""
    return _checked("level", value, 5)


def dmlab_label(value: int) -> int:
    """Class of a DMLab frame, {close, far, very far} x {positive, negative reward}, as it is published."""
    return _checked("label", value, 6)


def _last_below(thresholds: Sequence[float], value: float) -> int:
    """Index of the largest threshold that is strictly below the value."""
    return max(i for i, threshold in enumerate(thresholds) if threshold < value)


def _checked(what: str, value: int, count: int) -> int:
    if not 0 <= value < count:
        raise DataError(f"{what}: {value}; accepted: 0 to {count - 1}; check the data")
    return int(value)
