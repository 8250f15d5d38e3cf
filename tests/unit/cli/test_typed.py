import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import bit_ray
from bit_ray.cli.main import COMMANDS, main
from bit_ray.cli.shards import InspectConfig
from bit_ray.cli.training import exit_status
from bit_ray.cli.typed import as_typed, command, typed
from bit_ray.errors import BitRayError, ConfigError, DataError
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig, ReplayConfig


@pytest.fixture(autouse=True)
def of_no_command() -> Iterator[None]:
    token = command.set(None)
    yield
    command.reset(token)


def test_what_a_user_types_for_each_setting() -> None:
    names = typed(FinetuneConfig)
    assert names["subset_seed"] == "--subset-seed"
    assert names["rule.base_lr"] == "--rule.base-lr"
    assert names["runtime.cache.max_gb"] == "--runtime.cache.max-gb"
    assert names["random_flip"] == "--no-random-flip"
    assert names["shuffle"] == "--shuffle.*"
    assert typed(PretrainConfig)["recipe.random_flip"] == "--recipe.no-random-flip"
    assert typed(InspectConfig)["shards"] == "SHARDS"


@pytest.mark.parametrize(
    ("cls", "setting", "flag"),
    [
        (FinetuneConfig, "subset_seed", "--subset-seed"),
        (FinetuneConfig, "rule.base_lr", "--rule.base-lr"),
        (FinetuneConfig, "base_lr", "--rule.base-lr"),
        (FinetuneConfig, "micro_batch_size", "--runtime.micro-batch-size"),
        (FinetuneConfig, "rule.boundaries[1]", "--rule.boundaries"),
        (VtabConfig, "micro_batch_size", "--runtime.micro-batch-size"),
        (ReplayConfig, "micro_batch_size", "--runtime.micro-batch-size"),
        (InspectConfig, "shards", "SHARDS"),
        # The command's own setting, although a part has one of the same name.
        (PretrainConfig, "name", "--name"),
        (PretrainConfig, "shards", "--shards"),
        (PretrainConfig, "probe.shards", "--probe.shards"),
        (FinetuneConfig, "num_examples", "num_examples"),
        (FinetuneConfig, "", ""),
    ],
)
def test_an_error_names_a_setting_as_the_user_types_it(cls: type, setting: str, flag: str) -> None:
    error = DataError.of(setting, 3, "4") if setting else DataError("3; 4")
    assert as_typed(error) is error  # outside of a command
    command.set(cls)
    found = as_typed(error)
    assert type(found) is DataError
    assert str(found) == (f"{flag}: 3; accepted: 4; correct it" if setting else "3; 4")


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Both:
    first: Part = field(default_factory=Part)
    second: Part = field(default_factory=Part)


def test_a_name_that_two_parts_have_is_not_guessed() -> None:
    command.set(Both)
    assert str(as_typed(ConfigError.of("size", 1, "2"))).startswith("size: 1; ")
    assert str(as_typed(ConfigError.of("second.size", 1, "2"))).startswith("--second.size: 1; ")


def test_the_subject_of_an_error_stays_before_the_flag() -> None:
    command.set(VtabConfig)
    error = as_typed(ConfigError.of("crop", 16, "32").about("svhn"))
    assert str(error) == "svhn: --rule.crop: 16; accepted: 32; correct it"


VTAB = ["vtab", "--name", "x", "--model", "R50x1"]
FINETUNE = ["finetune", "--name", "x", "--shards", "data"]
PACKAGE = Path(bit_ray.__file__).parent
SHARDS = Path(__file__).parents[2] / "assets" / "shards_format_1"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([*VTAB, "--rule.base-lr", "0"], "--rule.base-lr: 0.0; accepted: a number above 0; "),
        ([*VTAB, "--rule.crop", "16"], "--rule.crop: 16; accepted: at least 32 pixels; "),
        ([*VTAB, "--subset-seed", "-1"], "--subset-seed: -1; accepted: a whole number of at least 0; "),
        ([*VTAB, "--num-train", "few"], "--num-train: given 'few' (str); accepted: a whole number"),
        ([*VTAB, "--tasks", "mnist"], "--tasks: mnist; accepted: caltech101, "),
        ([*VTAB, "--train", "head"], "--train: head, but init is empty; accepted: all, or weights to start from; "),
        (["vtab", "--name", "x"], "--init: empty, and model is empty; accepted: weights to start from, or a model "),
        (["vtab", "--name", "a/b", "--model", "m"], "--name: given 'a/b'; accepted: text that can name a folder, "),
        ([*FINETUNE, "--subset-seed", "-1"], "--subset-seed: -1; accepted: a whole number of at least 0; "),
        ([*FINETUNE, "--rule.momentum", "1"], "--rule.momentum: 1.0; accepted: 0 to below 1; "),
        ([*FINETUNE, "--rule.regime", "tiny"], "--rule.regime: given 'tiny' (str); accepted: 'small' or 'medium' or "),
        ([*FINETUNE, "--runtime.max-failures", "-1"], "--runtime.max-failures: -1; accepted: a whole number of at "),
        (["replay", "--run", "x", "--step", "few"], "--step: given 'few' (str); accepted: a whole number"),
        (["pretrain", "--name", "x", "--shards", "d", "--recipe.epochs", "0"], "--recipe.epochs: 0.0; accepted: "),
        (["pretrain", "--name", "x", "--shards", "d", "--probe.shots", "0"], "--probe.shots: (0,); accepted: "),
        (["shards", "inspect", "data", "--augmented"], "--augmented: given without sheet; accepted: "),
        (["shards", "ids", "--step", "1"], "SHARDS: missing; accepted: a shard set; "),
        (["predict", "--model", "m", "x.jpg", "--features"], "--features: given without output; accepted: "),
        (
            ["models", "export", "m", "--output", "x", "--format", "onnx", "--int8"],
            "--shards: empty with int8; accepted: ",
        ),
    ],
)
def test_a_command_names_its_flag(arguments: list[str], error: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {error}")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--name", "x", "--register.alias", "v1"], "--register.alias: 'v1'; accepted: letters, digits, _ and -, but "),
        (["--name", "x", "--register.name", "a/b"], "--register.name: 'a/b'; accepted: letters, digits, _ . - and "),
        (["--name", "a:b"], "--name: 'a:b'; accepted: letters, digits, _ . - and spaces; "),
    ],
)
def test_a_name_that_cannot_be_registered_is_refused_before_anything_starts(
    flags: list[str], error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "--shards", str(SHARDS), *flags]) == 2
    out, err = capfd.readouterr()
    assert (out.count("\n"), err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {error}")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("study list", "models known")])
def test_every_command_names_a_flag_in_what_it_raises_while_it_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = typed(COMMANDS[name].config)
    known = ("shards", "output", "address")
    setting = next((path for path in names if path.endswith("tracking.uri") or path in known), "storage")

    def run(config: object) -> None:
        raise ConfigError.of(setting, 1, "2")

    needed = {
        name: [] if "positional" in field.metadata else [f"--{name.replace('_', '-')}"]
        for field in dataclasses.fields(COMMANDS[name].config)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for name in [field.name]
    }
    given = {"format": "npz", "command": "pretrain"}
    arguments = [word for name, flag in needed.items() for word in (*flag, given.get(name, "1"))]
    extra = {
        "shards ids": ["data", "--step", "1", "--global-batch-size", "8"],
        "plan": ["--gpu", "h100"],
        "vtab": ["--model", "R50x1"],
        "sweep": ["--space", "recipe.epochs=1,2"],
    }.get(name, [])
    monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(run=run))
    assert main([*name.split(), *arguments, *extra]) == 2
    assert capfd.readouterr().err == f"error: {names[setting]}: 1; accepted: 2; correct it\n"


def test_an_error_outside_of_a_command_keeps_its_field(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> Callable[[], object]:
        error: BitRayError = ConfigError.of("shards", 1, "2")
        raise error

    assert main([*FINETUNE, "--subset-seed", "-1"]) == 2
    capfd.readouterr()
    assert exit_status(fails) == 2
    assert capfd.readouterr().err == "error: shards: 1; accepted: 2; correct it\n"


def by_hand(source: str) -> list[str]:
    """Errors about settings whose field is part of the text, so that the command line cannot name the flag."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name("ConfigError" | "MissingError"), args=[ast.Constant(text), *_]):
                found.append(text)
            case ast.Call(
                func=ast.Name("ConfigError" | "MissingError"), args=[ast.JoinedStr([ast.Constant(text), *_]), *_]
            ):
                found.append(text)
    return [text for text in found if re.match(r"(--)?[a-z][a-z0-9_.-]*: ", text)]


def test_no_error_names_a_setting_by_hand() -> None:
    found = {path.name: texts for path in PACKAGE.rglob("*.py") if (texts := by_hand(path.read_text()))}
    # A recipe is chosen before there is a config, and a command is no setting.
    assert found == {"flags.py": ["--recipe: "], "submission.py": ["preflight: "]}
    assert by_hand('raise ConfigError(f"shots: {shots}; accepted: at least 1; raise it")') == ["shots: "]
    assert by_hand('raise ConfigError("init: empty; accepted: weights; name some")')
