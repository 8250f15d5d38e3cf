import io
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image

from bit_ray.data.sources.embedded.catalog import CATALOG, open_embedded
from bit_ray.data.sources.embedded.glyphs import (
    FACES,
    GlyphSource,
    characters,
    class_name,
    permuted_characters,
    render_glyph,
)
from bit_ray.errors import ConfigError, DataError


def test_classes_are_letters_and_symbols_without_any_digit():
    found = characters()
    assert len(FACES) == 16
    assert len(found) == len(set(found)) == 2993
    assert {unicodedata.category(c)[0] for c in found} == {"L", "S"}
    for character in found:
        # Neither a digit nor a character that stands for one, such as a superscript or a circled digit.
        assert not any(c.isdigit() for c in unicodedata.normalize("NFKC", character))
        assert unicodedata.numeric(character, None) is None
    assert {"A", "z", "O", "l", "Ω", "Ж", "+", "€"} <= set(found)


def test_class_names_are_unique_and_say_what_is_drawn():
    assert class_name("A") == "U+0041 LATIN CAPITAL LETTER A"
    names = GlyphSource("l").class_names
    assert len(set(names)) == len(names) == 2993


def test_small_is_a_part_of_medium_is_a_part_of_large():
    small, medium, large = (GlyphSource(size) for size in "sml")
    assert [len(s.class_names) for s in (small, medium, large)] == [50, 500, 2993]
    assert medium.class_names[:50] == small.class_names
    assert large.class_names[:500] == medium.class_names
    assert len(medium) == 30_000
    assert list(small.part(np.array([77]))) == list(large.part(np.array([77])))
    assert permuted_characters(0) != permuted_characters(1)
    assert sorted(permuted_characters(1)) == list(characters())


def test_a_glyph_is_a_pure_function_of_seed_class_and_index():
    first = render_glyph(3, 7)
    np.testing.assert_array_equal(first, render_glyph(3, 7))
    assert (first != render_glyph(3, 8)).any()
    assert (first != render_glyph(3, 7, seed=1)).any()
    source = GlyphSource("s")
    (example,) = source.part(np.array([3 * 60 + 7]))
    assert example.id == f"glyphs/U+{ord(source.characters[3]):04X}/00007"
    assert example.labels == (3,)
    with Image.open(io.BytesIO(example.image)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        np.testing.assert_array_equal(np.asarray(image), np.dstack([first] * 3))


def test_glyphs_are_dark_ink_on_white_inside_the_frame():
    images = np.stack([render_glyph(label, index) for label in range(100) for index in range(5)])
    assert images.shape == (500, 32, 32)
    assert images.dtype == np.uint8
    assert np.median(images) == 255
    darkest = images.min((1, 2))
    assert (darkest < 128).mean() > 0.97
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert ((border < 128).mean(1) > 0.2).mean() < 0.02  # hardly any is cut by the frame


def test_examples_of_a_class_differ_in_place_size_and_slant():
    label = permuted_characters().index("E")
    images = np.stack([render_glyph(label, i) for i in range(60)]) < 128
    heights = images.any(2).sum(1)
    assert heights.min() < 18 < 26 < heights.max()
    assert len({image.tobytes() for image in images}) == 60


def test_validation_examples_are_others_than_those_to_train_on():
    train, val = GlyphSource("s"), GlyphSource("s", split="val")
    assert val.class_names == train.class_names
    assert len(val) == 500
    trained = {example.image for example in train.part(np.arange(len(train)))}
    held_out = list(val.part(np.arange(len(val))))
    assert not trained & {example.image for example in held_out}
    assert held_out[-1].labels == (49,)


def test_rendering_keeps_up():
    source = GlyphSource("m")
    start = time.process_time()
    num_bytes = sum(len(e.image) for e in source.part(np.arange(0, 30_000, 20)))
    seconds_for_all = (time.process_time() - start) * 20
    assert seconds_for_all < 60  # 8 s on an idle core
    assert 300 < num_bytes / 1500 < 1500


@pytest.mark.parametrize("name", CATALOG)
def test_every_embedded_set_opens_and_gives_examples(name):
    source = open_embedded(name)
    (example,) = source.part(np.array([len(source) - 1]))
    assert source.class_names[example.labels[0]]


def test_a_name_or_option_that_is_not_there():
    with pytest.raises(DataError, match="glyps:m: no such embedded data set.*did you mean glyphs:m"):
        open_embedded("glyps:m")
    for options in ({"size": "xl"}, {"size": "s", "split": "test"}, {"size": "s", "examples_per_class": 0}):
        with pytest.raises(ConfigError, match="accepted: "):
            GlyphSource(**options)
