"""What the tests of training share."""

import pytest
from glyph_runs import write_glyphs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """400 glyphs of 50 classes."""
    return write_glyphs(tmp_path_factory.mktemp("glyphs") / "shards")
