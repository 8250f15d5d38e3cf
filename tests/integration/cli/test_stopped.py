"""A command that is stopped by Ctrl-C or by SIGTERM: one line, a checkpoint, and nothing that goes on running."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.run_folder import RunFolder

pytestmark = pytest.mark.cluster

SMALL = [
    *("--model", "R1-1-1-1x0.5", "--recipe.epochs", "1", "--recipe.decay-epochs", "0.5", "--recipe.warmup-steps", "2"),
    *("--recipe.global-batch-size", "30", "--recipe.crop-size", "32", "--runtime.num-workers", "1"),
]


@pytest.mark.timeout(500)
def test_ctrl_c_and_sigterm_end_a_run_with_one_line_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    write_shards(GlyphSource("s", examples_per_class=3), tmp_path / "glyphs", name="glyphs", row_group_size=8)
    command = [str(Path(sys.executable).with_name("bit-ray")), "pretrain", "--name", "stopped", "--shards", "glyphs"]
    command += [*SMALL, "--recipe.epochs", "100000", "--runtime.log-every-steps", "5"]
    saved = 0
    for numbers, status in (
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGTERM], 130),  # the second ends it at once
    ):
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = psutil.Popen(command, cwd=tmp_path, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            while not any(int(step) > saved for step in re.findall(r"step (\d+)/", out.read_text())):
                assert process.poll() is None, err.read_text()
                time.sleep(0.2)
            started = process.children(recursive=True)
            commands = [" ".join(each.cmdline()) for each in started if each.is_running()]
            if len(numbers) > 1:  # they cannot save before the second comes
                halted = [
                    each for each in started if each.is_running() and "RayTrainWorker" in " ".join(each.cmdline())
                ]
                for worker in halted:
                    worker.suspend()
            for number in numbers:
                if number == signal.SIGINT:
                    os.killpg(process.pid, number)  # as a terminal does
                else:
                    process.send_signal(number)
                while len(numbers) > 1 and "once more ends it at once" not in out.read_text():
                    assert process.poll() is None, err.read_text()
                    time.sleep(0.1)
            assert process.wait(60) == status
        finally:
            if process.is_running():
                process.kill()
        text = out.read_text()
        assert "Traceback" not in text
        assert "stopped: saving at the next step; once more ends it at once" in text
        if saved:
            assert f"from step {saved}: " in text
            assert "no step lost (the run was started again)" in text
        if len(numbers) == 1:
            [last] = re.findall(r"^stopped: saved after step (\d+); start it again to go on\n$", err.read_text())
            assert int(last) > saved
            saved = int(last)
        else:
            assert err.read_text() == "interrupted\n"
        assert RunFolder(str(tmp_path / "bit_ray_runs" / "stopped")).newest_checkpoint() == saved
        assert len(started) > 5
        assert any("RayTrainWorker" in command for command in commands)
        assert not any("PreemptionWatcher" in command for command in commands)
        assert psutil.wait_procs(started, timeout=20)[1] == []
