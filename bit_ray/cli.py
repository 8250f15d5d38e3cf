"""The `bit-ray` command. Each subcommand imports what it needs when it runs, so that ``--help`` comes at once."""

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bit_ray import cli_export, cli_models, cli_shards, cli_suites, jobs
from bit_ray.errors import ConfigError
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.flags import parse
from bit_ray.studies.config import FewShotConfig
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig, ReplayConfig


class Command(NamedTuple):
    """A subcommand: what it takes, what it does, and its line in the overview."""

    config: type[Any]
    run: Callable[[Any], None]
    summary: str


GROUPS: dict[str, dict[str, Command]] = {
    "data": {
        "shards write": Command(cli_shards.WriteConfig, cli_shards.write, "write images and labels as a shard set"),
        "shards inspect": Command(
            cli_shards.InspectConfig, cli_shards.inspect, "show what is in one, as numbers and as a picture"
        ),
        "shards verify": Command(
            cli_shards.VerifyConfig, cli_shards.verify, "read all of one and report what is wrong"
        ),
        "shards ids": Command(cli_shards.IdsConfig, cli_shards.ids, "ask any training step what it saw"),
        "shards bench": Command(cli_shards.BenchConfig, cli_shards.bench, "measure reading, decoding and the stream"),
    },
    "training": {
        "pretrain": Command(PretrainConfig, jobs.pretrain, "pre-train on a shard set: BiT-S, BiT-M, BiT-L or own"),
        "finetune": Command(FinetuneConfig, jobs.finetune, "transfer to a shard set by BiT-HyperRule"),
        "evaluate": Command(EvaluateConfig, jobs.evaluate, "score a model on a whole shard set"),
        "replay": Command(ReplayConfig, jobs.replay, "train a stretch of a run again and compare its loss"),
    },
    "suites": {
        "fewshot": Command(FewShotConfig, cli_suites.fewshot, "transfer to k examples per class, several draws each"),
        "vtab": Command(VtabConfig, cli_suites.vtab, "transfer to the 19 tasks of VTAB-1k"),
        "probe": Command(cli_suites.ProbeModelConfig, cli_suites.probe, "score frozen features in seconds"),
        "episodes": Command(cli_suites.EpisodesConfig, cli_suites.episodes, "score frozen features N-way K-shot"),
    },
    "models": {
        "predict": Command(cli_models.PredictConfig, cli_models.predict, "classify image files"),
        "models list": Command(cli_models.ListConfig, cli_models.list_models, "list what is registered"),
        "models export": Command(
            cli_export.ExportConfig, cli_export.export_model, "write one for ONNX, timm, Hugging Face and others"
        ),
        "models rank": Command(cli_suites.RankConfig, cli_suites.rank, "find the one that suits some images"),
        "models pull": Command(cli_models.PullConfig, cli_models.pull, "copy a registered model to a folder"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return jobs.exit_status(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(args: list[str]) -> None:
    for length in (1, 2):
        name = " ".join(args[:length])
        if name in COMMANDS:
            config = parse(COMMANDS[name].config, args[length:], prog=f"bit-ray {name}")
            COMMANDS[name].run(config)
            return
    words = [arg for arg in args[:2] if not arg.startswith("-")]
    prefixes = {name.split()[0] for name in COMMANDS if " " in name}
    if not words and all(arg in ("-h", "--help") for arg in args):
        print(_overview(""))
    elif words and words[0] in prefixes and len(words) == 1:
        print(_overview(words[0]))
    else:
        given = " ".join(words) or args[0]
        near = difflib.get_close_matches(given, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{given}: unknown command; {hint}see bit-ray --help")


def _overview(prefix: str) -> str:
    """Return the help of the whole command, or of the subcommands that start with a word."""
    lines = [f"usage: bit-ray {prefix or 'COMMAND'} {'COMMAND ' if prefix else ''}[OPTIONS]"]
    if not prefix:
        lines += ["", "Big Transfer (BiT) on Ray: pre-train, transfer, register, predict."]
    for group, commands in GROUPS.items():
        shown = [(name, command) for name, command in commands.items() if name.startswith(prefix)]
        if shown:
            lines += ["", group, *(f"  bit-ray {name:<16}{command.summary}" for name, command in shown)]
    return "\n".join([*lines, "", "Each command explains its options: bit-ray COMMAND --help"])


if __name__ == "__main__":
    sys.exit(main())
