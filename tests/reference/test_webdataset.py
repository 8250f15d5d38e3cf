"""The webdataset library writes, it and we read: the same examples in the same order."""

import io

import numpy as np
import pytest
import webdataset
from PIL import Image

from bit_ray.data.sources.webdataset import open_webdataset


@pytest.fixture
def pattern(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(f"{tmp_path}/train-%06d.tar", maxcount=7, verbose=0) as writer:
        for i in range(20):
            image = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
            suffix = ("jpg", "png", "JPEG")[i % 3]
            record = {"label": f"class {i % 4}", "all": [i % 4, 3 - i % 2]}
            writer.write({"__key__": f"part.a/{i:05d}", suffix: image, "cls": i % 5, "json": record})
    return f"{tmp_path}/train-{{000000..000002}}.tar"


def test_pixels_and_labels_are_those_that_the_library_reads(pattern):
    reference = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    by_index = open_webdataset(pattern)
    by_name = open_webdataset(pattern, label="label")
    several = open_webdataset(pattern, label="all", multi_label=True)
    order = np.arange(len(reference))
    assert len(by_index) == len(by_name) == len(several) == len(reference) == 20
    for expected, *found in zip(reference, *(s.part(order) for s in (by_index, by_name, several)), strict=True):
        image = next(expected[suffix] for suffix in ("jpg", "png", "jpeg", "JPEG") if suffix in expected)
        for example in found:
            assert example.id.endswith(expected["__key__"])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(example.image)).convert("RGB")), image)
        assert found[0].labels == (expected["cls"],)
        assert by_name.class_names[found[1].labels[0]] == expected["json"]["label"]
        assert list(found[2].labels) == expected["json"]["all"]
