import json

import pytest
from mlflow import MlflowClient
from shard_sets import vouch_for

from bit_ray.config import from_dict
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.read import read_rows
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.glyphs import GlyphSource
from bit_ray.errors import DataError
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.training.checkpoint.state import Position
from bit_ray.training.config import PretrainConfig, Runtime
from bit_ray.training.pretrain import pretrain

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def damaged(tmp_path):
    """200 glyphs, the first of which has lost its pixels; and its id."""
    uri = tmp_path / "shards"
    write_shards(GlyphSource("s", examples_per_class=4), uri, name="glyphs", row_group_size=16, shard_examples=128)
    path = uri / "shard-00000.parquet"
    data = path.read_bytes()
    start = data.index(b"IDAT") + 8
    path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    vouch_for(uri)
    return uri, read_rows(str(uri), read_manifest(uri), 0, [0])["id"][0].as_py()


def run_config(folder, shards, max_bad_images, num_workers):
    recipe = UpstreamRecipe(
        name="small",
        epochs=2,
        decay_epochs=(),
        global_batch_size=50,
        base_lr_per_256=0.1,
        warmup_steps=0,
        crop_size=32,
    )
    return PretrainConfig(
        name="quarantine",
        shards=str(shards),
        model="R1-1-1-1x0.5",
        storage=str(folder),
        recipe=recipe,
        runtime=Runtime(num_workers=num_workers, log_every_steps=4, max_bad_images=max_bad_images),
    )


def test_a_bad_image_is_left_out_counted_once_and_reported(damaged, tmp_path, capsys):
    shards, bad_id = damaged
    result = pretrain(run_config(tmp_path, shards, 1, num_workers=2)).result
    assert result.metrics["data/bad_images"] == 1  # in two epochs, by two workers
    shown = capsys.readouterr().out
    assert "Left out: 1 images that cannot be read" in shown
    assert bad_id in shown
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    path = client.download_artifacts(result.run_id, "bad_images.json", str(tmp_path))
    with open(path) as file:
        [recorded] = json.load(file)
    assert (recorded["id"], recorded["shard"], recorded["row"]) == (bad_id, "shard-00000.parquet", 0)
    [checkpoint] = tmp_path.glob("quarantine/step-*/training.json")
    [kept] = from_dict(Position, json.loads(checkpoint.read_text())["progress"]).bad_images
    assert kept.id == bad_id


def test_more_bad_images_than_allowed_stop_the_run_with_one_line(damaged, tmp_path):
    shards, bad_id = damaged
    with pytest.raises(DataError) as caught:
        pretrain(run_config(tmp_path, shards, 0.001, num_workers=1))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(
        f"{shards}: 1 images cannot be read; accepted: at most 0 (runtime.max_bad_images); first: shard-00000"
    )
    assert bad_id in text
