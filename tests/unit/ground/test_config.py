import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from bit_ray.config import digest, from_dict, replace, to_dict
from bit_ray.config_files import read_config, read_mapping, write_config
from bit_ray.errors import ConfigError
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Model:
    units: tuple[int, ...] = (1, 1)
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ConfigError(f"width: given {self.width}; accepted: above 0; choose 0.5 or more")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    kind: Literal["staircase", "cosine"] = "staircase"
    base_lr: float = 0.003
    clip: float | None = None
    seed: int | str = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    model: Model = Model()
    schedule: Schedule | None = None
    crop: tuple[int, float] = (128, 1.0)
    stages: tuple[Model, ...] = ()
    shuffle: bool = True
    scores: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


FULL = Recipe(
    name="übung: yes",
    model=Model(units=(3, 4, 6, 3), width=0.5),
    schedule=Schedule(kind="cosine", base_lr=1e-05, clip=0.1 + 0.2, seed="1e-4"),
    crop=(480, 0.875),
    stages=(Model(), Model(width=3.0)),
    shuffle=False,
    scores={"top-1": 0.9, "a.b": 1e300},
    notes={"list": [1, 2.5, None, {"deep": True}], "text": "1e-4"},
    tags={"no": "null", "1": "2026-01-01"},
)


@pytest.mark.parametrize("config", [FULL, Recipe(name="bare")])
@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_a_config_survives_the_file(config: Recipe, suffix: str, tmp_path: Path) -> None:
    write_config(config, tmp_path / f"config.{suffix}")
    assert read_config(Recipe, tmp_path / f"config.{suffix}") == config
    assert [path.name for path in tmp_path.iterdir()] == [f"config.{suffix}"]


def test_to_dict_is_plain_json_in_field_order() -> None:
    plain = to_dict(FULL)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == ["name", "model", "schedule", "crop", "stages", "shuffle", "scores", "notes", "tags"]
    assert plain["model"] == {"units": [3, 4, 6, 3], "width": 0.5}
    assert from_dict(Recipe, plain) == FULL


def test_digest_is_that_of_the_canonical_json() -> None:
    # sha256 of the text on the command line: printf '{"units":[1,1],"width":1.0}' | sha256sum
    assert digest(Model()) == "9ee40d0f9a31209144902a11b3e7c78c71319e2d7cbde19295ef53f184d1a79a"
    assert digest({"width": 1.0, "units": (1, 1)}) == digest(Model())


def test_equal_configs_have_equal_digests() -> None:
    assert digest(Model(width=1)) == digest(Model(width=1.0)) == digest(Model(width=np.float64(1.0)))
    assert digest(Schedule(clip=-0.0)) == digest(Schedule(clip=0.0)) == digest(Schedule(clip=0))
    assert digest(Recipe(name="a", notes={"b": (1, 2)})) == digest(Recipe(name="a", notes={"b": [1, 2]}))
    assert len({digest(Model(width=width)) for width in (1.0, math.nextafter(1.0, 2.0), 2.0)}) == 3


def test_an_int_is_taken_for_a_float_and_kept_as_one() -> None:
    width = from_dict(Model, {"width": 2}).width
    assert (type(width), width) == (float, 2.0)


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("1E6", 1e6), ("-2.5e3", -2500.0), (".5e1", 5.0)])
def test_exponents_that_yaml_reads_as_text_are_numbers(text: str, number: float, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"base_lr: {text}\nseed: {text}\nclip: {text}\n")
    assert read_config(Schedule, tmp_path / "config.yaml") == Schedule(base_lr=number, seed=text, clip=number)


def test_a_union_keeps_the_type_of_the_value() -> None:
    assert [type(from_dict(Schedule, {"seed": seed}).seed) for seed in (3, "3")] == [int, str]


REFUSED = [
    ({}, "name: missing; accepted: text; add it"),
    (None, "config: given None (NoneType); accepted: a mapping with the settings name, model,"),
    (["name"], "config: given ['name'] (list); accepted: a mapping with the settings name, model,"),
    ({"name": 1}, "name: given 1 (int); accepted: text"),
    ({"nmae": "a"}, "nmae: unknown setting; accepted: name, model, schedule, crop, stages, shuffle, "),
    ({"name": "a", 3: 4}, "3: unknown setting; accepted: name, model, "),
    ({"model": {"widht": 1}}, "model.widht: unknown setting; accepted: units, width; did you mean model.width?"),
    ({"model": {"width": "wide"}}, "model.width: given 'wide' (str); accepted: a finite number"),
    ({"model": {"width": "0.5"}}, "model.width: given '0.5' (str); accepted: a finite number"),
    ({"model": {"width": True}}, "model.width: given True (bool); accepted: a finite number"),
    ({"model": {"width": None}}, "model.width: given None (NoneType); accepted: a finite number"),
    ({"model": {"width": math.nan}}, "model.width: given nan (float); accepted: a finite number"),
    ({"model": {"width": "1e999"}}, "model.width: given '1e999' (str); accepted: a finite number"),
    ({"model": {"width": 10**400}}, "model.width: given 1000000000"),
    ({"model": {"units": [2**63]}}, "model.units[0]: given 9223372036854775808 (int); accepted: a whole number"),
    ({"model": {"units": [16**5000]}}, "model.units[0]: given some int (int); accepted: a whole number"),
    ({"model": {"width": -1}}, "model.width: given -1.0; accepted: above 0; choose 0.5 or more"),
    ({"model": {"units": 3}}, "model.units: given 3 (int); accepted: a list, each item a whole number"),
    ({"model": {"units": "34"}}, "model.units: given '34' (str); accepted: a list, each item a whole number"),
    ({"model": {"units": [1, 2.0]}}, "model.units[1]: given 2.0 (float); accepted: a whole number"),
    ({"model": {"units": [True]}}, "model.units[0]: given True (bool); accepted: a whole number"),
    ({"model": [1]}, "model: given [1] (list); accepted: a mapping with the settings units, width"),
    ({"schedule": {"kind": "linear"}}, "schedule.kind: given 'linear' (str); accepted: 'staircase' or 'cosine'"),
    ({"schedule": {"clip": "a"}}, "schedule.clip: given 'a' (str); accepted: a finite number or null"),
    ({"schedule": {"seed": 1.5}}, "schedule.seed: given 1.5 (float); accepted: a whole number or text"),
    ({"schedule": {"base_rl": 1}}, "schedule.base_rl: unknown setting; accepted: kind, base_lr, clip, seed; did you"),
    ({"schedule": "cosine"}, "schedule: given 'cosine' (str); accepted: a mapping with the settings kind, base_lr, "),
    ({"crop": [1]}, "crop: given [1] (list); accepted: a list of 2: a whole number, a finite number"),
    ({"stages": [{}, {"width": "a"}]}, "stages[1].width: given 'a' (str); accepted: a finite number"),
    ({"shuffle": 1}, "shuffle: given 1 (int); accepted: true or false"),
    ({"scores": {"a": "b"}}, "scores.a: given 'b' (str); accepted: a finite number"),
    ({"scores": {1: 2.0}}, "scores: given 1 (int); accepted: text"),
    ({"notes": {"a": [{"b": {1}}]}}, "notes.a[0].b: given {1} (set); accepted: finite numbers, text, "),
    ({"notes": {"a": math.inf}}, "notes.a: given inf (float); accepted: finite numbers, text, "),
    ({"tags": {"line\nbreak": 1}}, "tags.'line\\nbreak': given 1 (int); accepted: text"),
    ({"name": b"a\nb" * 99}, "name: given b'a\\nba\\nba"),
]


@pytest.mark.parametrize(("data", "line"), REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(data: Any, line: str) -> None:
    if data and isinstance(data, dict) and not {"name", "nmae"} & set(data):
        data = {"name": "a", **data}
    with pytest.raises(ConfigError) as caught:
        from_dict(Recipe, data)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_errors_name_the_place_given_by_the_caller() -> None:
    with pytest.raises(ConfigError, match=r"^manifest\.model\.units\[0\]: given 'a'"):
        from_dict(Recipe, {"name": "a", "model": {"units": ["a"]}}, where="manifest")


def test_a_wrong_value_set_in_code_is_found_when_written(tmp_path: Path) -> None:
    wrong = Recipe(name="a", schedule=Schedule(kind="linear", clip=math.inf))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^schedule\.kind: given 'linear'"):
        write_config(wrong, tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"^clip: given inf"):
        digest(Schedule(clip=math.inf))
    assert list(tmp_path.iterdir()) == []


def test_replace_changes_leaves_and_parts_and_nothing_else() -> None:
    changed = replace(FULL, {"model.width": 2, "schedule.clip": None, "crop": (32, 1), "tags": {"a": "b"}})
    assert to_dict(changed) == {
        **to_dict(FULL),
        "model": {"units": [3, 4, 6, 3], "width": 2.0},
        "schedule": {**to_dict(FULL)["schedule"], "clip": None},
        "crop": [32, 1.0],
        "tags": {"a": "b"},
    }
    assert replace(FULL, {"model.width": 4, "model": Model(units=(9,))}).model == Model(units=(9,), width=4.0)
    assert replace(Recipe(name="a"), {"schedule": Schedule(seed=3)}).schedule == Schedule(seed=3)
    assert FULL.model.width == 0.5


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.widht": 2}, "model.widht: unknown setting; accepted: .*; did you mean model.width?$"),
        ({"model.width.x": 2}, "model.width.x: unknown setting; accepted: .*; did you mean model.width?$"),
        ({"": 2}, ": unknown setting; accepted: name, model, model.units, "),
        ({"model.width": 0}, "model.width: given 0.0; accepted: above 0; choose 0.5 or more$"),
        ({"model.units": ["a"]}, r"model.units\[0\]: given 'a' \(str\); accepted: a whole number$"),
        ({"model": Schedule()}, "model.kind: unknown setting; accepted: units, width$"),
    ],
)
def test_replace_refuses_typos_and_wrong_values(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match="^" + line.replace("?$", r"\?$")):
        replace(FULL, changes)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("gone.json", None, "no such file; accepted: a .json, .yaml or .yml file; check the path"),
        ("a.toml", b"", "unknown kind of file; accepted: .json, .yaml or .yml; rename it"),
        ("a.json", b"", "not valid JSON (Expecting value: line 1 column 1 (char 0)); correct the file"),
        ("a.json", b'{"width": 1', "not valid JSON (Expecting ',' delimiter: line 1 column 12 (char 11)); correct"),
        ("a.json", b'{"width": 1, "width": 2}', "not valid JSON ('width' is given twice); correct the file"),
        ("a.json", b'{"width": NaN}', "width: given nan (float); accepted: a finite number"),
        ("a.json", b"[" * 100_000, "not valid JSON ("),
        ("a.json", b"\xff", "not valid JSON ('utf-8' codec can't decode byte 0xff"),
        ("a.yaml", b"", "config: given None (NoneType); accepted: a mapping with the settings units, width"),
        ("a.yaml", b"width: [1", "not valid YAML (while parsing a flow sequence in "),
        ("a.yaml", b"width: 1\nwidth: 2\n", "not valid YAML ('width' is given twice); correct the file"),
        ("a.yaml", b"!!python/object/apply:os.getcwd []", "not valid YAML (could not determine a constructor for"),
        ("a.yaml", b"width: .inf", "width: given inf (float); accepted: a finite number"),
        ("a.yaml", b"widht: 1", "widht: unknown setting; accepted: units, width; did you mean width?"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    name: str, content: bytes | None, line: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(Model, tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {line}")
    assert "\n" not in str(caught.value)


def test_a_yaml_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nnotes: &a {again: *a}\n")
    with pytest.raises(
        ConfigError, match=r"a\.yaml: not valid YAML \(alias \*a; write the value out\); correct the file"
    ):
        read_config(Recipe, tmp_path / "a.yaml")


def test_read_mapping_gives_plain_data_and_refuses_what_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {width: 1e-4, units: [1]}\n")
    (tmp_path / "b.json").write_text("[1]")
    assert read_mapping(tmp_path / "a.yaml") == {"model": {"width": "1e-4", "units": [1]}}
    with pytest.raises(ConfigError, match=r"b\.json: config: given \[1\] \(list\); accepted: a mapping of settings"):
        read_mapping(tmp_path / "b.json")


def test_folders_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ConfigError, match=r"a\.json: cannot be read \(Is a directory\)"):
        read_config(Model, tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"a\.json: cannot be written \(Is a directory\)"):
        write_config(Model(), tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"a\.json: cannot be written \(No such file or directory\)"):
        write_config(Model(), tmp_path / "none" / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


NAMED: dict[str, Any] = {
    "pretrain": lambda name: PretrainConfig(name=name, shards="s"),
    "finetune": lambda name: FinetuneConfig(name=name, shards="s"),
    "few-shot": lambda name: FewShotConfig(name=name, init="m", shards="s", test_shards="t"),
    "vtab": lambda name: VtabConfig(name=name, init="m"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../x", "/abs", "a/b", "a\\b", "a?b", "a\nb", "a\0", "a\x1b[2J", "\udc80", "ü" * 101]
)
def test_the_name_of_a_run_that_cannot_be_a_folder_of_its_own_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match="^name: given .*; accepted: .*; choose another name$") as raised:
        NAMED[kind](name)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("name", ["r50x1", "R50x1.v2_b-3", "a run", "Übung", "写真", "lr=0.1", "..a", "x" * 200])
def test_names_of_runs_are_text_in_any_language(kind: str, name: str) -> None:
    assert NAMED[kind](name).name == name
