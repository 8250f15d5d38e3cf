"""What earlier code has left is read, continued and built on by today's.

``tests/assets/storage_1.tar.xz`` is a storage of revision ae8ac53: the run ``finished`` with checkpoints after 10 and
20 steps and its registered version, the run ``stopped`` that was interrupted after 20 of 60 steps, and the scores of
two studies. All but 4 of the 32 groups of channels were silenced before the first step, so that the files compress.
"""

import json
import sqlite3
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from glyph_runs import history, trained_here, weights

import bit_ray
from bit_ray.cli.main import main
from bit_ray.config import to_dict
from bit_ray.data.shards.manifest import read_manifest
from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.run_folder import RunFolder
from bit_ray.run_records import LeftOut
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.few_shot import FROM_SCRATCH, PRE_TRAINED, fewshot_suite
from bit_ray.studies.vtab import vtab_suite
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig, ReplayConfig, Runtime
from bit_ray.training.finetune import finetune, finetune_plan
from bit_ray.training.initial_weights import read_init
from bit_ray.training.pretrain import pretrain
from bit_ray.training.replay import replay

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]
ARCHIVE = Path(__file__).parents[2] / "assets" / "storage_1.tar.xz"
RULE = RuleOverrides(resize=36, crop=32, num_steps=3, warmup_steps=0, boundaries=(), batch_size=8, base_lr=0.01)
# Every table and column of the database in which a path stands.
COLUMNS = (
    ("runs", "artifact_uri"),
    ("tags", "value"),
    ("logged_models", "artifact_location"),
    ("experiments", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("model_version_tags", "value"),
)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage, as if it had been made where it lies now; also the current directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "storage"
    for file in folder.rglob("*"):
        if file.is_file() and (file.suffix in (".json", ".md") or file.name == "MLmodel"):
            file.write_text(file.read_text().replace("/old/storage", str(folder)))
    with sqlite3.connect(folder / "mlflow.db") as database:
        for table, column in COLUMNS:
            database.execute(f"UPDATE {table} SET {column} = replace({column}, '/old/storage', ?)", (str(folder),))
    database.close()
    monkeypatch.chdir(folder)
    return folder


def run_config(name: str, num_steps: int) -> PretrainConfig:
    recipe = UpstreamRecipe(
        name="small",
        epochs=num_steps * 16 / 40,
        decay_epochs=(),
        global_batch_size=16,
        base_lr_per_256=0.4,
        warmup_steps=0,
        crop_size=32,
    )
    runtime = Runtime(num_workers=1, log_every_steps=5, checkpoint_every_steps=10, num_checkpoints_to_keep=1)
    return PretrainConfig(name=name, shards="shards", model="R1-1-1-1x0.5", storage=".", recipe=recipe, runtime=runtime)


def test_any_step_of_an_old_run_can_be_asked_and_computed_again(storage: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["shards", "ids", "shards", "--run", "finished", "--step", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    seen = [line.split()[2].removeprefix("digits/test/") for line in lines if "digits/test/" in line]
    assert seen[:8] == ["00076", "00003", "00082", "00007", "00053", "00040", "00015", "00063"]
    assert len(seen) == 16

    found = replay(ReplayConfig(run=str(storage / "finished"), step=14))
    assert (found.start_step, found.first_step, found.last_step) == (10, 10, 14)
    # Another processor rounds otherwise.
    assert found.replayed == pytest.approx(found.recorded, rel=1e-3)


def test_an_old_run_that_is_done_stays_so(storage: Path):
    before = (storage / "finished" / "result.json").read_bytes()
    trained = pretrain(replace(run_config("finished", 20), runtime=Runtime(num_workers=1)))
    assert trained is not None
    assert to_dict(trained.result) == json.loads(before)
    assert (storage / "finished" / "result.json").read_bytes() == before


def test_an_old_run_that_was_stopped_goes_on_from_its_checkpoint(storage: Path):
    """And leaves out the batch that its folder says, although it may not leave out any by itself."""
    RunFolder(str(storage / "stopped")).leave_out(LeftOut(step=34, why="by hand"))
    config = run_config("stopped", 60)
    trained = pretrain(replace(config, runtime=replace(config.runtime, log_every_steps=1)))
    assert trained is not None
    assert Path(trained.result.package_uri) == storage / "stopped" / "step-00000060"
    folder = RunFolder(str(storage / "stopped"))
    [start] = folder.starts()
    assert start.first_step == 20
    assert (start.device, start.precision, start.num_workers, start.micro_batch_size) == ("cpu", "fp32", 1, 16)
    assert folder.checkpoints("training.json")[-1] == 60
    steps = {step for step, _ in history(storage, trained.result.run_id)}
    assert steps == {5, 10, 15, 20, *range(25, 61)} - {35}  # it had come to step 25


def test_an_old_registered_version_is_loaded_and_transferred(storage: Path):
    model = bit_ray.load_model("models:/finished@champion", tracking_uri=f"sqlite:///{storage}/mlflow.db")
    result = json.loads((storage / "finished" / "result.json").read_text())
    assert model.sha256 == result["sha256"]
    config = FinetuneConfig(
        name="transferred",
        init="models:/finished@champion",
        shards="shards",
        rule=RULE,
        storage=".",
        runtime=Runtime(num_workers=1),
    )
    trained = finetune(config)
    assert trained is not None
    assert (trained.version.name, trained.version.version) == ("transferred", 1)
    # From an older checkpoint, by its place, without the cluster.
    config = replace(config, init=str(storage / "finished" / "step-00000010"))
    init, manifest = read_init(config.init, None), read_manifest("shards")
    plan = finetune_plan(config, manifest, init, manifest.num_examples)
    losses, again = trained_here(plan, "shards", init_weights=init.tensors)
    assert sorted(losses) == [1, 2, 3]
    other = weights(trained.result.package_uri)
    assert again.keys() == other.keys()
    assert not all(torch.equal(again[name], other[name]) for name in other)


def test_scores_of_old_studies_are_read_and_not_made_again(storage: Path):
    files = sorted(storage.glob("*study/scores/*.json"))
    assert len(files) == 5
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    scores = {file.stem: json.loads(file.read_text())["top_1"] for file in files}
    report = fewshot_suite(
        FewShotConfig(
            name="study",
            init="finished/step-00000020",
            shards="shards",
            test_shards="shards",
            shots=(1,),
            num_subsets=2,
            rule=RULE,
            random_flip=False,
            scratch_lrs=(0.01,),
            storage=".",
        )
    )
    for row, name in zip(report.rows, (PRE_TRAINED, FROM_SCRATCH), strict=True):
        files_of = [f"{name.replace(' ', '-')}-1-per-class-seed-{seed}-lr-0.01" for seed in range(2)]
        assert row.values == tuple(scores[file] for file in files_of)
    tasks = vtab_suite(
        VtabConfig(
            name="vtab-study",
            model="R1-1-1-1x0.5",
            tasks=("svhn",),
            data_dir="nowhere",
            num_train=20,
            num_val=4,
            rule=RULE,
            storage=".",
        )
    )
    assert [score.top_1 for score in tasks.scores] == [scores["svhn"]]
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
