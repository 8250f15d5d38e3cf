import io
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_sets import vouch_for

from bit_ray.cli.main import main
from bit_ray.config import to_dict
from bit_ray.data.images.decode import decode_image
from bit_ray.data.images.resize import train_view
from bit_ray.data.images.views import TrainView, example_keys, uniforms
from bit_ray.data.shards.inspect import contact_sheet
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.base import Example
from bit_ray.data.stream.history import StreamPlan, draw_views, read_plan, uses_in_step, uses_of_image
from bit_ray.data.stream.settings import Shuffle
from bit_ray.recipes.schedules import Schedule
from bit_ray.training.plan import TrainPlan

NUM_IMAGES, BATCH, NUM_STEPS, SEED = 60, 16, 11, 5
SIZE = 112  # of a tile on a sheet, so that views stand on it as they are
UPSTREAM = TrainView(crop="inception", crop_size=SIZE)
SHUFFLE = Shuffle(num_lanes=2, lane_window=8, full_up_to=10)


def png(i):
    pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    uri = tmp_path_factory.mktemp("ids") / "set"
    examples = (Example(f"e{i:02d}", png(i), (i % 3,)) for i in range(NUM_IMAGES))
    write_shards(examples, uri, class_names=["ant", "bee", "cat"], name="t", row_group_size=4, shard_examples=15)
    return str(uri)


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run's folder, with the plan as a run leaves it there."""
    plan = TrainPlan(
        kind="pretrain",
        model="R50x1",
        num_classes=3,
        manifest_digest=read_manifest(shards).digest,
        num_examples=NUM_IMAGES,
        view=TrainView(crop="inception", crop_size=SIZE),
        resize_mode="square",
        resize_size=SIZE,
        loss="softmax",
        schedule=Schedule(
            base_lr=0.1,
            num_steps=NUM_STEPS,
            warmup_steps=1,
            boundaries=(5,),
            kind="staircase",
            boundary_rule="upstream",
        ),
        global_batch_size=BATCH,
        seed=SEED,
        shuffle=SHUFFLE,
    )
    directory = tmp_path_factory.mktemp("run")
    (directory / "plan.json").write_text(json.dumps({"digest": plan.digest, "shards": shards, "plan": to_dict(plan)}))
    return str(directory)


def ask(capfd, *arguments):
    """Status, the words of each line printed, and errors."""
    status = main(["shards", "ids", *arguments])
    out, err = capfd.readouterr()
    return status, [line.split() for line in out.splitlines()], err


def tile(path, index):
    """Pixels of a sheet's tile."""
    row, column = divmod(index, 8)
    x, y = 8 + 120 * column, 8 + 154 * row
    with Image.open(path) as sheet:
        return np.asarray(sheet.convert("RGB"))[y : y + SIZE, x : x + SIZE]


def same(shown, image, epoch, seed=SEED, view=UPSTREAM):
    """Whether pixels are the training view of an image, up to rounding."""
    expected = train_view(decode_image(png(int(image[1:]))), view, uniforms(seed, int(epoch), example_keys([image]))[0])
    return np.abs(shown.astype(int) - expected).max() <= 2


def test_a_step_lists_its_examples_in_slot_order(shards, run):
    plan, place, manifest = read_plan(run)
    assert (place, manifest) == (shards, read_manifest(shards))
    assert plan == StreamPlan(
        seed=SEED,
        global_batch_size=BATCH,
        view=to_dict(TrainView(crop="inception", crop_size=SIZE)),
        shuffle=SHUFFLE,
        num_steps=NUM_STEPS,
    )
    tables = [
        pq.read_table(f"{shards}/{shard.path}", columns=["id", "labels"]).to_pylist() for shard in manifest.shards
    ]
    for step in (0, 3, NUM_STEPS - 1):
        expected = []
        for slot, (epoch, shard, row) in enumerate(plan.order(manifest).rows_of_step(step)):
            example = tables[shard][row]
            name = manifest.class_names[example["labels"][0]]
            expected.append((epoch, step, slot, shard, row, example["id"], (name,)))
        assert uses_in_step(shards, manifest, plan, step) == expected


def test_steps_and_images_are_each_others_inverse(shards, run):
    plan, _, manifest = read_plan(run)
    by_step = [use for step in range(NUM_STEPS) for use in uses_in_step(shards, manifest, plan, step)]
    assert len(by_step) == NUM_STEPS * BATCH
    for image in ("e00", "e31", "e59"):
        uses = uses_of_image(shards, manifest, plan, image, num_epochs=1)
        assert uses == [use for use in by_step if use.id == image]
        assert len(uses) in (2, 3)  # 11 steps of 16 are 2.9 epochs


def test_the_command_prints_a_step_and_an_image(shards, run, capfd):
    status, lines, err = ask(capfd, shards, "--run", run, "--step", "4")
    assert (status, err) == (0, "")
    assert lines[0] == ["slot", "epoch", "id", "labels"]
    assert [int(line[0]) for line in lines[1:]] == list(range(BATCH))
    slot, epoch, image, label = lines[6]
    assert label == ["ant", "bee", "cat"][int(image[1:]) % 3]
    status, uses, err = ask(capfd, "--run", run, "--image", image)
    assert (status, err) == (0, "")
    assert uses[0] == ["epoch", "step", "slot", "labels"]
    assert [epoch, "4", slot, label] in uses
    settings = ["--seed", "5", "--global-batch-size", "16"]
    shuffle = ["--shuffle.num-lanes", "2", "--shuffle.lane-window", "8", "--shuffle.full-up-to", "10"]
    assert ask(capfd, shards, "--step", "4", *settings, *shuffle)[1] == lines
    status, uses, err = ask(capfd, shards, "--image", image, *settings, *shuffle, "--epochs", "4")
    assert [int(line[0]) for line in uses[1:]] == [0, 1, 2, 3]


def test_the_sheet_of_a_step_shows_the_views_that_training_sees(shards, run, tmp_path, capfd):
    path = str(tmp_path / "step.png")
    status, lines, _ = ask(capfd, shards, "--run", run, "--step", "3", "--sheet", path)
    assert status == 0
    assert {epoch for _, epoch, _, _ in lines[1:]} == {"0", "1"}
    for slot, (_, epoch, image, _) in enumerate(lines[1:]):
        assert same(tile(path, slot), image, epoch)
    _, epoch, image, _ = lines[1]
    assert not same(tile(path, 1), image, epoch)
    status, uses, _ = ask(capfd, shards, "--run", run, "--image", image, "--sheet", path)
    assert status == 0
    for place, (epoch, _, _, _) in enumerate(uses[1:]):
        assert same(tile(path, place), image, epoch)
    # Fewer than there are: spread over the slots.
    assert ask(capfd, shards, "--run", run, "--step", "3", "--sheet", path, "--num-images", "2")[0] == 0
    _, epoch, image, _ = lines[1 + BATCH // 2]
    assert same(tile(path, 1), image, epoch)


def test_an_image_that_cannot_be_decoded_is_a_white_tile(tmp_path):
    examples = [Example(f"e{i}", png(i), (0,)) for i in range(4)]
    write_shards(examples, tmp_path / "set", class_names=["ant"], name="t")
    path = next((tmp_path / "set").glob("*.parquet"))
    data = bytearray(path.read_bytes())
    at = data.index(png(2))
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    manifest = vouch_for(tmp_path / "set")
    plan = StreamPlan(seed=0, global_batch_size=4, view={"crop": "resize", "crop_size": SIZE})
    uses = uses_in_step(tmp_path / "set", manifest, plan, 0)
    draw_views(tmp_path / "set", manifest, plan, uses, tmp_path / "sheet.png")
    white = [bool((tile(tmp_path / "sheet.png", i) == 255).all()) for i in range(4)]
    assert white == [use.id == "e2" for use in uses]


def test_only_what_is_asked_for_is_read(shards, run, capfd, tmp_path):
    # The images of a copy of the set are wiped out: ids and labels need none of them.
    copy = tmp_path / "set"
    shutil.copytree(shards, copy)
    for path in copy.glob("*.parquet"):
        data = path.read_bytes()
        for i in range(NUM_IMAGES):
            data = data.replace(png(i), bytes(len(png(i))))
        path.write_bytes(data)
    assert ask(capfd, str(copy), "--run", run, "--step", "3") == ask(capfd, shards, "--run", run, "--step", "3")
    assert ask(capfd, str(copy), "--run", run, "--image", "e07") == ask(capfd, shards, "--run", run, "--image", "e07")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--step", "-1"], "--step: -1; accepted: 0 or more"),
        (["--run", "RUN", "--step", "11"], "--step: 11; accepted: 0 to 10, the steps of the run"),
        (["--run", "RUN", "--image", "e60"], "--image: e60: no such id in SHARDS"),
        (["--run", "RUN"], "--step: neither it nor image is given; accepted: one of the two; ask --step T or"),
        (
            ["--run", "RUN", "--step", "1", "--image", "e00"],
            "--step: 1, and image is given too; accepted: one of the two",
        ),
        (["--step", "1"], "--global-batch-size: missing; accepted: images per step; give it, or the run"),
        (["--step", "1", "--global-batch-size", "0"], "--global-batch-size: 0; accepted: 1 or more"),
        (["--step", "1", "--global-batch-size", "4", "--seed", "-1"], "--seed: -1; accepted: 0 or more"),
        (["--run", "RUN", "--step", "1", "--seed", "0"], "--seed: 0 with a run; accepted: the run's own"),
        (["--run", "RUN", "--step", "1", "--shuffle.num-lanes", "3"], "--shuffle.*: given with a run"),
        (["--run", "SHARDS", "--step", "1"], "SHARDS: not a run (no plan.json in it)"),
        (["--run", "RUN/none", "--step", "1"], "RUN/none: not a run (no plan.json in it)"),
        (
            ["--step", "1", "--global-batch-size", "4", "--sheet", "x.png", "--crop-size", "8"],
            "--crop-size: 8; accepted: 32 or more",
        ),
    ],
)
def test_a_question_that_has_no_answer_is_refused_in_one_line(shards, run, capfd, arguments, message):
    arguments = [argument.replace("RUN", run).replace("SHARDS", shards) for argument in arguments]
    status, _, err = ask(capfd, shards, *arguments)
    assert status == 2
    assert err.startswith(f"error: {message.replace('RUN', run).replace('SHARDS', shards)}")
    assert err.count("\n") == 1


def test_without_a_run_the_set_is_needed(capfd):
    status, _, err = ask(capfd, "--step", "1", "--global-batch-size", "4")
    assert status == 2
    assert err.startswith("error: SHARDS: missing; accepted: a shard set; give it, or the run by --run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["plan"].pop("seed"), "plan.json: seed: missing"),
        (lambda plan: plan["plan"].update(global_batch_size="16"), "global_batch_size: given '16' (str)"),
        (
            lambda plan: plan.update(plan=[]),
            "plan.json: plan: given [] (list); accepted: a mapping; restore the file",
        ),
        (lambda plan: plan["plan"].update(manifest_digest="f" * 64), "accepted: ffffffffffff, the set that the run"),
    ],
)
def test_a_damaged_plan_and_another_set_are_refused(shards, run, tmp_path, capfd, change, message):
    with open(f"{run}/plan.json") as file:
        plan = json.load(file)
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    status, _, err = ask(capfd, shards, "--run", str(tmp_path), "--step", "0")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_set_that_was_recorded_with_keys_is_asked_for_anew(shards, run, tmp_path, capfd):
    with open(f"{run}/plan.json") as file:
        plan = json.load(file)
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "shards": "s3://AK:PLANTED@bucket/set"}))
    asked = ["--run", str(tmp_path), "--step", "0"]
    assert main(["shards", "ids", *asked]) == 2
    err = capfd.readouterr().err
    assert re.search(r"plan.json: shards: s3://\*\*\*@bucket/set: a key .* give the URI of the shard set", err)
    assert "PLANTED" not in err
    assert ask(capfd, shards, *asked)[0] == 0


def test_an_augmented_sheet_shows_three_views_beside_each_image(shards, tmp_path):
    contact_sheet(shards, tmp_path / "sheet.png", n=6, seed=3, view=TrainView(crop="inception", crop_size=SIZE))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 + 12 * 120 + 2 * 16, 8 + 2 * 154)
        pixels = np.asarray(sheet.convert("RGB"))
    for epoch in range(3):
        x = 8 + 120 * (1 + epoch)
        shown = pixels[8 : 8 + SIZE, x : x + SIZE]
        assert sum(same(shown, f"e{i:02d}", epoch, seed=3) for i in range(NUM_IMAGES)) == 1


def test_a_sheet_shows_the_views_of_fine_tuning(shards, tmp_path, capfd):
    flags = ["--finetune", "--crop-size", str(SIZE), "--sheet", str(tmp_path / "sheet.png"), "--num-images", "6"]
    assert main(["shards", "inspect", shards, *flags]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    view = TrainView(crop="resize_crop", crop_size=SIZE, resize_size=140)  # 160 to 128 is the rule's for such images
    for epoch in range(3):
        x = 8 + 120 * (1 + epoch)
        shown = pixels[8 : 8 + SIZE, x : x + SIZE]
        assert sum(same(shown, f"e{i:02d}", epoch, seed=0, view=view) for i in range(NUM_IMAGES)) == 1


@pytest.mark.parametrize("flag", ["--augmented", "--finetune"])
def test_an_augmented_sheet_needs_a_file(shards, capfd, flag):
    assert main(["shards", "inspect", shards, flag]) == 2
    assert capfd.readouterr().err.startswith(f"error: {flag}: given without sheet")
