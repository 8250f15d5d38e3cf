from pathlib import Path

import pytest
import torch

from bit_ray.errors import ConfigError, ModelError
from bit_ray.run_folder import RunFolder, Start
from bit_ray.training.device import resolve_precision
from bit_ray.training.replay import precision_of

CPU = torch.device("cpu")


def test_a_step_is_replayed_in_the_precision_of_its_start(tmp_path: Path):
    folder = RunFolder(str(tmp_path))
    assert precision_of(folder, 5, CPU) == "auto"  # a run of before it was recorded
    settings = {"device": "cuda", "num_workers": 1, "micro_batch_size": 8}
    folder.record_start(Start(first_step=0, precision="fp32", **settings))
    folder.record_start(Start(first_step=10, precision="bf16", **settings))
    assert precision_of(folder, 9, CPU) == "fp32"
    try:
        resolve_precision("bf16", CPU)
    except ConfigError:
        with pytest.raises(ModelError, match="trained in bf16 on cuda, for which this cpu device has no fast path; "):
            precision_of(folder, 10, CPU)
    else:
        assert precision_of(folder, 10, CPU) == "bf16"
