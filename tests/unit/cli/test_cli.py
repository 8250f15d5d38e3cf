import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bit_ray.cli.flags import RECIPES, parse
from bit_ray.cli.main import COMMANDS, main
from bit_ray.cli.studies import ProbeModelConfig
from bit_ray.config import to_dict
from bit_ray.config_files import write_config
from bit_ray.data.stream.settings import Shuffle
from bit_ray.errors import ConfigError
from bit_ray.recipes.upstream import bit_l, bit_s
from bit_ray.studies.study_config import SweepConfig
from bit_ray.submission.config import SubmitConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig

# Prints the help of every command where neither PyTorch nor Ray nor MLflow can be found.
HELP_OF_ALL = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torch", "torchvision", "ray", "mlflow")
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from bit_ray.cli.main import COMMANDS, main

for name in ["", "shards", "runs", "models", *COMMANDS]:
    print(f"## {name}")
    try:
        assert main([*name.split(), "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
"""

# A new flag is a decision: the names a user types are a contract.
FLAGS = {
    "shards write": "SOURCE OUTPUT --name --class-names --multi-label --root --data-dir --download --no-check-size "
    "--label --convert-images --upright --on-bad "
    "--seekable --shorter-side --row-group-size --shard-examples --seed --num-workers",
    "shards inspect": "SHARDS --sheet --num-images --augmented --finetune --crop-size --seed",
    "shards verify": "SHARDS --no-decode --num-workers",
    "shards ids": "SHARDS --step --image --sheet --num-images --run --seed --global-batch-size --epochs --crop-size "
    "--shuffle.*",
    "shards bench": "SHARDS --crop-size --batch-size --num-threads --seconds",
    "replay": "--run --step --config --shards --runtime.* --tracking.*",
    "runs diagnose": "RUN --config --storage --tracking.*",
    "train": "FOLDER --name --config --minutes --init --method --crop-size --no-random-flip --val-share --test-share "
    "--drop-duplicates --seed --storage --dry-run --tracking.* --register.*",
    "pretrain": "--name --shards --config --recipe --model --storage --seed --mixup-alpha --dropout --norm-batch "
    "--clip-norm --head-bias --keep-best --dry-run --recipe.* --shuffle.* --probe.* --runtime.* --tracking.* "
    "--register.*",
    "finetune": "--name --shards --config --init --model --test-shards --profile --no-random-crop --no-random-flip "
    "--train --norm-batch --shots --subset-seed --storage --seed --dry-run --rule.* --shuffle.* --runtime.* "
    "--tracking.* --register.*",
    "plan": "--gpus --gpu --recipe --model --num-images --epochs --global-batch-size --num-classes --crop-size "
    "--shards --seekable --calibrate --run --price --prices.* --node.* --failures.*",
    "fewshot": "--name --init --shards --test-shards --config --shots --num-subsets --subsets --scratch-lrs --profile "
    "--no-random-crop --no-random-flip --train --storage --rule.* --tracking.*",
    "sweep": "COMMAND --name --config --set --space --val-shards --val-share --stop-early --fewer --trials --search "
    "--search-seed --where --side-by-side --save-every-s --price --storage --tracking.* --dry-run",
    "study run": "STUDY --name --config --set --axes --seeds --val-shards "
    "--where --side-by-side --save-every-s --price --storage --tracking.* --dry-run",
    "study compare": "--name --config --init --tasks --space --seeds --val-share --profile --rule.* --no-random-crop "
    "--no-random-flip --trials --search --search-seed "
    "--where --side-by-side --save-every-s --price --storage --tracking.* --dry-run",
    "study list": "",
    "study report": "NAME --config --output --storage --tracking.*",
    "vtab": "--name --config --init --model --tasks --data-dir --shards --index --subset-seed --num-train --num-val "
    "--protocol --profile --rule.* --train --seed --runtime.* --side-by-side --storage --tracking.* --dry-run",
    "probe": "MODEL SHARDS --shots --num-subsets --neighbors --resize --crop --storage --tracking.*",
    "episodes": "MODEL SHARDS --ways --shots --queries --num-episodes --seed --storage --tracking.*",
    "models rank": "FOLDER --models --shots --per-class --by --convert-images --storage --tracking.*",
    "evaluate": "--model --shards --config --labels --crop-size --name --batch-size --storage --tracking.*",
    "predict": "IMAGE --model --labels --crop-size --output --features --top-k --convert-images --batch-size --device "
    "--storage --tracking.*",
    "report": "MODEL --output --images --num-images --storage --tracking.*",
    "demo": "MODEL --port --device --storage --tracking.*",
    "models export": "MODEL --output --format --labels --crop-size --int8 --shards --num-images --rescale --storage "
    "--tracking.*",
    "models list": "--storage --tracking.*",
    "submit": "JOB ARGS --address --no-preflight --no-wait --env",
    "preflight": "JOB ARGS --address --env",
    "status": "RUN --storage --address --node-price",
    "models known": "",
    "models pull": "MODEL --output --storage --tracking.*",
}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    assert done.stderr == ""
    sections = done.stdout.split("## ")[1:]
    return {section.partition("\n")[0]: section.partition("\n")[2] for section in sections}


def words(text: str) -> list[str]:
    """What each entry of a help starts with; the lines that go on with a text are indented."""
    return re.findall(r"^│ (\S+)", text, re.MULTILINE)


def test_every_command_explains_itself_without_pytorch_ray_and_mlflow(helps: dict[str, str]) -> None:
    assert set(helps) == {"", "shards", "runs", "models", *COMMANDS}
    for name, command in COMMANDS.items():
        assert f"bit-ray {name} " in helps[""]
        assert command.summary in helps[""]
        assert helps[name].startswith(f"usage: bit-ray {name}")
        *lines, example = helps[name].splitlines()
        assert max(map(len, lines)) <= 100
        assert example.startswith(f"Example: bit-ray {name}")
        assert "None" not in helps[name]
        assert "``" not in helps[name]
        assert "STR" not in helps[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_can_be_typed(name: str) -> None:
    parse(COMMANDS[name].config, COMMANDS[name].example.split(), prog=f"bit-ray {name}")


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    command = f"{sys.executable} -m bit_ray.cli.main pretrain --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: bit-ray pretrain")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_set_of_flags_is_the_agreed_one(helps: dict[str, str], name: str) -> None:
    found = [word for word in words(helps[name]) if word.startswith("--") or (word.isupper() and word.isalpha())]
    groups = [f"{word.split('.')[0]}.*" if "." in word else word for word in found]
    assert sorted(set(groups)) == sorted(FLAGS[name].split())


def test_every_field_of_a_config_has_a_flag_and_a_text(helps: dict[str, str]) -> None:
    found = words(helps["pretrain"])
    for field in dataclasses.fields(bit_s()):
        flag = f"--recipe.{'no-' if field.name == 'random_flip' else ''}{field.name.replace('_', '-')}"
        assert found.count(flag) == 1
    shown = " ".join(helps["pretrain"].replace("│", " ").split())
    assert "--runtime.num-workers INT Training workers: a number, or MIN:MAX to follow a cluster" in shown
    assert "--recipe.decay-epochs FLOAT ... Epochs after which the learning rate is divided by ten" in shown
    assert "(default: 30 60 80)" in shown


@pytest.mark.parametrize("arguments", [["--help"], ["shards", "--help"], ["shards", "write", "--help"]])
def test_help_comes_at_once(arguments: list[str]) -> None:
    before = os.times()
    subprocess.run([sys.executable, "-m", "bit_ray.cli.main", *arguments], capture_output=True, check=True, timeout=60)
    after = os.times()  # processor time, which other work on the machine does not lengthen
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.0


NEEDED = ["--name", "run", "--shards", "data"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["finetune", *NEEDED, "--shot", "5"],
            "--shot: unknown flag; did you mean --shots? see bit-ray finetune --help",
        ),
        (
            ["finetune", *NEEDED, "--runtime.num-worker=5"],
            "--runtime.num-worker: unknown flag; did you mean --runtime.nu",
        ),
        (["finetune", *NEEDED, "--random-flip"], "--random-flip: unknown flag; did you mean --no-random-flip?"),
        (["finetune", *NEEDED, "extra"], "extra: not expected here; accepted: flags, each with its value"),
        (
            ["finetune", *NEEDED, "--shots"],
            "Missing value for argument '--shots'. Expected 1 values; see bit-ray finetune",
        ),
        (["finetune", *NEEDED, "--shots", "few"], "--shots: given 'few' (str); accepted: a whole number"),
        (
            ["finetune", *NEEDED, "--profile", "best"],
            "--profile: given 'best' (str); accepted: 'code' or 'paper' or 'chea",
        ),
        (
            ["finetune", "--shards", "data"],
            "--name: missing; accepted: Name of the run; starting again with the same na",
        ),
        (["pretrain", *NEEDED, "--recipe", "bit_x"], "--recipe: bit_x; accepted: bit_s, bit_m, bit_l; choose one"),
        (
            ["pretrain", *NEEDED, "--keep-best", "top_1", "--probe.shots", "5"],
            "--keep-best: top_1; accepted: ridge_5_shot, knn_5_shot; choose one, or change probe.shots",
        ),
        (
            ["pretrain", *NEEDED, "--keep-best", "knn_5_shot"],
            "--keep-best: knn_5_shot, but probe.shards is empty; accepted: a score of the probes; give probe.shards, "
            "or leave it out",
        ),
        (
            ["finetune", *NEEDED, "--runtime.heal", "-1"],
            "--runtime.heal: -1; accepted: a whole number of at least 0; raise it",
        ),
        (["pretrain", *NEEDED, "--recipe"], "--recipe: no value; see bit-ray pretrain --help"),
        (
            ["pretrain", *NEEDED, "--recipe.area-range", "0.5"],
            "Missing value for argument '--recipe.area-range'. Expect",
        ),
        (
            ["pretrain", *NEEDED, "--recipe.epochs", "-1"],
            "--recipe.epochs: -1.0; accepted: above 0; the paper has 90 (S, M) or 40 (L)",
        ),
        (
            ["pretrain", *NEEDED, "--runtime.num-workers", "-1"],
            "--runtime.num-workers: -1; accepted: a whole number, or MIN:MAX such as 2:8 with MIN at ",
        ),
        (["shards", "write"], "SOURCE: missing; accepted: Folder of class folders"),
        (["shards", "write", "a", "b", "c"], "c: not expected here"),
        (["predict", "--model", "m"], "IMAGE ...: missing; accepted: Image files; with --output also folders"),
        (
            ["submit", "pretrain", "--shards", "s3://b/s", "--", "--name", "up"],
            "--shards: unknown flag; those of the job come after --; see bit-ray submit --help",
        ),
        (["models"], None),
        (["model", "list"], "model list: unknown command; did you mean models list? see bit-ray --help"),
        (["--verbose"], "--verbose: unknown command; see bit-ray --help"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    arguments: list[str], error: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(arguments)
    out, err = capfd.readouterr()
    if error is None:
        assert (status, err) == (0, "")
        assert "bit-ray models pull" in out
        return
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {error}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("replay", "--micro-batch-size", "--runtime.micro-batch-size"),
        ("vtab", "--micro-batch-size", "--runtime.micro-batch-size"),
        ("predict", "--convert", "--convert-images"),
        ("train", "--image-size", "--crop-size"),
        ("status", "--price", "--node-price"),
        ("plan", "--images", "--num-images"),
        ("plan", "--batch-size", "--global-batch-size"),
        ("models export", "--num-examples", "--num-images"),
    ],
)
def test_a_flag_that_was_renamed_is_answered_with_its_new_name(command: str, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"^{old}: unknown flag; did you mean {new}[?]"):
        parse(COMMANDS[command].config, [*COMMANDS[command].example.split(), f"{old}=1"], prog=f"bit-ray {command}")


@pytest.mark.parametrize(
    "flags",
    [
        "JOB --address http://h:1 --env A=1 B=2 --no-wait --",
        "--address http://h:1 --env A=1 B=2 --no-wait JOB --",
        "--no-wait --address=http://h:1 --env A=1 B=2 JOB --",
        "--no-wait --address http://h:1 JOB --env A=1 B=2 --",
        "--no-wait --address http://h:1 --env A=1 B=2 -- JOB",
    ],
)
def test_flags_are_read_before_and_after_positionals(flags: str) -> None:
    job = ["study run"]  # two words
    before, _, after = flags.partition("JOB")
    found = parse(SubmitConfig, [*before.split(), *job, *after.split(), "--set", "name=a", "--no-wait"], prog="x")
    assert found == SubmitConfig(
        job="study run",
        settings=("--set", "name=a", "--no-wait"),
        address="http://h:1",
        env=("A=1", "B=2"),
        wait=False,
    )
    probed = parse(ProbeModelConfig, ["--shots", "1", "5", "--num-subsets", "3", "--", "m", "a", "b"], prog="x")
    assert (probed.shots, probed.num_subsets, probed.model) == ((1, 5), 3, "m")
    assert parse(SweepConfig, ["--name", "n", "--space", "a=1", "b=2", "pretrain"], prog="x").command == "pretrain"


def test_flags_win_over_a_recipe_over_a_file_over_a_jobs_defaults_over_the_configs_own(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: R50x3\nseed: 3\nrecipe: {momentum: 0.8}\nruntime: {num_workers: 4, compile: true}\n")
    flags = ["--config", str(file), "--seed", "5", "--runtime.num-workers=8", "--name", "run", "--shards", "data"]
    defaults = {"model": "R152x4", "recipe": bit_l(), "shuffle": Shuffle(num_lanes=64)}

    config = parse(PretrainConfig, flags, prog="job", **defaults)
    assert (config.model, config.seed, config.shuffle.num_lanes) == ("R50x3", 5, 64)
    assert (config.runtime.num_workers, config.runtime.compile) == (8, True)
    assert config.recipe == dataclasses.replace(bit_l(), momentum=0.8)
    assert config.storage == "bit_ray_runs"

    config = parse(PretrainConfig, [*flags, "--recipe", "bit_s", "--recipe.epochs", "91.5"], prog="job", **defaults)
    assert config.recipe == dataclasses.replace(bit_s(), epochs=91.5)


def test_values_of_all_kinds_are_read() -> None:
    flags = ["--rule.boundaries", "10", "20", "--rule.base-lr", "3e-3", "--rule.resize", "none", "--no-random-flip"]
    config = parse(FinetuneConfig, [*NEEDED, *flags, "--runtime.compile"], prog="job")
    assert (config.rule.boundaries, config.rule.base_lr, config.rule.resize) == ((10, 20), 0.003, None)
    assert (config.random_flip, config.random_crop, config.runtime.compile) == (False, True, True)
    assert parse(PretrainConfig, [*NEEDED, "--head-bias", "-10"], prog="job").head_bias == -10.0


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_recorded_config_replays_exactly(tmp_path: Path, name: str, suffix: str) -> None:
    flags = [
        "--recipe",
        name,
        "--recipe.no-random-flip",
        "--recipe.area-range",
        "0.2",
        "1",
        "--tracking.uri",
        "http://m",
    ]
    config = parse(PretrainConfig, [*NEEDED, *flags], prog="job")
    assert not config.recipe.random_flip
    write_config(config, tmp_path / f"config{suffix}")
    assert parse(PretrainConfig, ["--config", str(tmp_path / f"config{suffix}")], prog="job") == config


def test_a_flag_turns_on_what_a_file_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"random_flip": False, "rule": {"resize": 160}}))
    config = parse(
        FinetuneConfig, [*NEEDED, "--config", str(file), "--random-flip", "--rule.resize", "none"], prog="job"
    )
    assert config == parse(FinetuneConfig, NEEDED, prog="job")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"recipe": {"epoch": 3}}, "recipe.epoch: unknown setting"),
        ({"runtime": {"num_readers": "2"}}, "runtime.num_readers: given '2' (str)"),
        ({"recipe": {"epochs": -1}}, "recipe.epochs: -1"),
        ([1], "config: given [1] (list)"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, data: object, error: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as raised:
        parse(PretrainConfig, [*NEEDED, "--config", str(file)], prog="job")
    assert str(raised.value).startswith(f"{file}: {error}")


def test_what_is_missing_in_a_file_may_be_given_by_flags_and_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"shards": "data"}))
    assert parse(PretrainConfig, ["--config", str(file), "--name", "run"], prog="job").shards == "data"
    with pytest.raises(ConfigError, match="--name: missing"):
        parse(PretrainConfig, ["--config", str(file)], prog="job")


def test_ctrl_c_ends_with_a_short_line_and_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def raises(error: BaseException) -> None:
        def function(config: object) -> None:
            raise error

        monkeypatch.setitem(COMMANDS, "evaluate", COMMANDS["evaluate"]._replace(run=function))

    raises(KeyboardInterrupt())
    assert main(["evaluate", "--model", "m", "--shards", "s"]) == 130
    assert capfd.readouterr() == ("", "interrupted\n")
    raises(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", "--model", "m", "--shards", "s"])


def test_a_config_that_flags_built_goes_through_the_codec() -> None:
    config = parse(PretrainConfig, [*NEEDED, "--recipe.base-lr-per-256", "1"], prog="job")
    assert type(config.recipe.base_lr_per_256) is float
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
