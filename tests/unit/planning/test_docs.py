import re
from pathlib import Path

import pytest

from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.planning.costs import NETWORKS
from bit_ray.planning.forecast import forecast
from bit_ray.planning.inputs import inputs_of

PAGE = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
ROWS = re.findall(r"^\| (R\S+) \| (.+) \|$", PAGE, re.MULTILINE)


def test_the_page_has_every_network() -> None:
    assert [name for name, _ in ROWS] == list(NETWORKS)


@pytest.mark.parametrize(("name", "cells"), ROWS)
def test_the_table_of_the_docs_is_what_the_command_says(name: str, cells: str) -> None:
    def plan(seekable: bool = False) -> dict[str, float]:
        config = ClusterPlanConfig(gpus=64, gpu="h100", epochs=1, model=name, seekable=seekable)
        found = forecast(config, inputs_of(config))
        return {
            "GFLOP": found.inputs.network.flops(found.inputs.num_classes) / 1e9,
            "images/s": found.images_per_s.likely / 64,
            "GB/s": found.read_bytes_per_s.likely / 64 / 1e9,
            "requests/s": found.requests_per_s.likely / 64,
            "cores": found.cores_per_device.likely,
            "hours": found.train_s.likely / 3600,
        }

    shown = [cell.split("(")[0].strip().replace(",", "") for cell in cells.split("|")]
    one = plan()
    expected = [
        *(one[column] for column in ("GFLOP", "images/s", "GB/s", "requests/s", "cores")),
        plan(seekable=True)["cores"],
        one["hours"],
    ]
    for text, value in zip(shown, expected, strict=True):
        assert text == f"{value:.{len(text.partition('.')[2])}f}"
