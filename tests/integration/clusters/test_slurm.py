"""The SLURM script with all of Ray: two nodes, a training, and the signal before the time is up."""

import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_slurm import FakeSlurm
from s3_server import free_ports

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.run_folder import RunFolder

pytestmark = pytest.mark.cluster


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[FakeSlurm]:
    slurm = FakeSlurm(tmp_path, free_ports(1)[0])
    yield slurm
    slurm.end()


@pytest.mark.timeout(600)
def test_a_run_saves_and_the_job_is_queued_again_when_its_time_is_up(slurm: FakeSlurm, tmp_path: Path) -> None:
    write_shards(GlyphSource("s", examples_per_class=3), tmp_path / "shards", name="glyphs", row_group_size=8)
    command = shlex.split(
        f"bit-ray pretrain --name small --shards {tmp_path}/shards --storage {tmp_path}/runs --model R1-1-1-1x0.5 "
        "--recipe.epochs 400 --recipe.decay-epochs 300 --recipe.warmup-steps 2 --recipe.crop-size 32 "
        "--recipe.global-batch-size 30 --runtime.num-workers 1 --runtime.log-every-steps 1"
    )
    slurm.start(*command, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0")  # Ray would wait 20 s for its own actors
    slurm.until(lambda: re.search(r"small: step \d", slurm.log), seconds=280)
    slurm.warn()
    assert slurm.wait() == 143, slurm.log
    assert "The time is almost up" in slurm.log
    (saved,) = re.findall(r"saved after step (\d+)", slurm.log)
    assert RunFolder.of(str(tmp_path / "runs"), "small").newest_checkpoint() == int(saved)
    assert slurm.asked == f"requeue {slurm.number}\n"
    # Nothing is left of the cluster: no process, no folder.
    _, left = psutil.wait_procs(slurm.started(), timeout=5)
    assert left == []
    assert not list(Path(f"/tmp/bit_ray-{os.getuid()}").glob(f"{slurm.number}*"))
    assert stat.S_IMODE(slurm.token.stat().st_mode) == 0o600
