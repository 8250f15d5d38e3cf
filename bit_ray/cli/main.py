"""The `bit-ray` command, and the start of the files in ``jobs/``.

Each subcommand imports what it needs when it runs, so that ``--help`` is fast.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from bit_ray.autotrain.config import TrainConfig
from bit_ray.cli import (
    autotrain,
    export,
    models,
    planning,
    runs,
    shards,
    shards_write,
    status,
    studies,
    submission,
    sweeps,
    training,
)
from bit_ray.cli.flags import parse
from bit_ray.demo.config import DemoConfig
from bit_ray.errors import ConfigError, did_you_mean
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.planning.config import ClusterPlanConfig
from bit_ray.report.config import ModelReportConfig
from bit_ray.studies.config import DiagnoseConfig, FewShotConfig
from bit_ray.studies.study_config import CompareConfig, GridConfig, ReportConfig, SweepConfig
from bit_ray.studies.vtab_config import VtabConfig
from bit_ray.submission.config import PreflightConfig, SubmitConfig
from bit_ray.training.config import FinetuneConfig, PretrainConfig, ReplayConfig, StatusConfig

T = TypeVar("T")


class Command(NamedTuple):
    """A subcommand: its config, its function, and its line in the overview."""

    config: type[Any]
    run: Callable[[Any], None]
    summary: str
    example: str = ""
    """Arguments of an example; empty: none are needed."""


GROUPS: dict[str, dict[str, Command]] = {
    "data": {
        "shards write": Command(
            shards_write.WriteConfig,
            shards_write.write,
            "write images and labels as a shard set",
            "photos/train shards/train --name photos --convert-images --upright",
        ),
        "shards inspect": Command(
            shards.InspectConfig,
            shards.inspect,
            "show what is in one, as numbers and as a picture",
            "shards/train --sheet sheet.png --augmented",
        ),
        "shards verify": Command(
            shards.VerifyConfig, shards.verify, "read all of one and report what is wrong", "shards/train"
        ),
        "shards ids": Command(
            shards.IdsConfig,
            shards.ids,
            "ask any training step what it saw",
            "--run bit_ray_runs/photos --step 100 --sheet step-100.png",
        ),
        "shards bench": Command(
            shards.BenchConfig,
            shards.bench,
            "measure reading, decoding and the stream",
            "s3://BUCKET/shards --crop-size 224",
        ),
    },
    "training": {
        "train": Command(
            TrainConfig, autotrain.train, "make a classifier from a folder of images", "photos/ --minutes 10"
        ),
        "pretrain": Command(
            PretrainConfig,
            training.pretrain,
            "pre-train on a shard set: BiT-S, BiT-M, BiT-L or own",
            "--name up --shards shards/train --recipe bit_m --model R50x1",
        ),
        "finetune": Command(
            FinetuneConfig,
            training.finetune,
            "transfer to a shard set by BiT-HyperRule",
            "--name photos --init bit_m_r50x1 --shards shards/train --test-shards shards/test --dry-run",
        ),
        "evaluate": Command(
            EvaluateConfig,
            training.evaluate,
            "score a model on a whole shard set",
            "--model models:/photos@champion --shards shards/test",
        ),
        "replay": Command(
            ReplayConfig,
            training.replay,
            "train a stretch of a run again and compare its loss",
            "--run bit_ray_runs/photos --step 100",
        ),
        "runs diagnose": Command(DiagnoseConfig, runs.diagnose, "say of a run whether it is still learning", "up"),
    },
    "studies": {
        "fewshot": Command(
            FewShotConfig,
            studies.fewshot,
            "transfer to k examples per class, several draws each",
            "--name few --init models:/up@champion --shards shards/train --test-shards shards/test --shots 1 5 10",
        ),
        "vtab": Command(
            VtabConfig,
            studies.vtab,
            "transfer to the 19 tasks of VTAB-1k",
            "--name vtab --init bit_m_r50x1 --data-dir datasets",
        ),
        "sweep": Command(
            SweepConfig,
            sweeps.sweep,
            "search over any settings of pretrain or finetune",
            "finetune --name lr --set init=bit_m_r50x1 shards=shards/train --space rule.base-lr=log:1e-4:1e-1",
        ),
        "study run": Command(
            GridConfig,
            sweeps.study_run,
            "train a grid of settings, several seeds each, and report",
            "weight-decay --dry-run",
        ),
        "study compare": Command(
            CompareConfig,
            sweeps.study_compare,
            "compare BiT-HyperRule with a sweep",
            "--init models:/up@champion --tasks shards/train,shards/test --trials 20 --dry-run",
        ),
        "study list": Command(sweeps.ListConfig, sweeps.study_list, "list the studies of what the paper found"),
        "study report": Command(
            ReportConfig,
            sweeps.study_report,
            "write the report of a study from MLflow again",
            "weight-decay --output report",
        ),
        "probe": Command(
            studies.ProbeModelConfig,
            studies.probe,
            "score frozen features in seconds",
            "models:/up@champion shards/train shards/test",
        ),
        "episodes": Command(
            studies.EpisodesConfig,
            studies.episodes,
            "score frozen features N-way K-shot",
            "models:/up@champion shards/test --ways 5 --shots 1",
        ),
    },
    "cluster": {
        "plan": Command(
            ClusterPlanConfig,
            planning.plan,
            "estimate days, money and network of a pre-training",
            "--model R152x4 --num-images 300e6 --epochs 40 --gpus 256 --gpu h100 --price 2.5",
        ),
        "submit": Command(
            SubmitConfig,
            submission.submit,
            "run a job on a Ray cluster with this machine's code, and follow it",
            "jobs/pretrain_jft.py --address http://HEAD:8265 -- --name up --shards s3://BUCKET/jft --storage s3://BUCKET/runs",
        ),
        "preflight": Command(
            PreflightConfig,
            submission.preflight,
            "look in seconds whether a job would run there",
            "pretrain --address http://HEAD:8265 -- --name up --shards s3://BUCKET/jft --storage s3://BUCKET/runs",
        ),
        "status": Command(
            StatusConfig, status.status, "show where runs stand, what they cost, and what is idle", "photos"
        ),
    },
    "models": {
        "predict": Command(
            models.PredictConfig, models.predict, "classify image files", "photo.jpg --model models:/photos@champion"
        ),
        "report": Command(
            ModelReportConfig,
            models.report,
            "write a page about one: how good, where it errs, what it looks at",
            "models:/photos@champion --output photos.html",
        ),
        "demo": Command(
            DemoConfig, models.demo, "try one in the browser, by dropping images", "models:/photos@champion"
        ),
        "models list": Command(models.ListConfig, models.list_models, "list what is registered"),
        "models export": Command(
            export.ExportConfig,
            export.export_model,
            "write one for ONNX, timm, Hugging Face and others",
            "models:/photos@champion --output photos-onnx --format onnx",
        ),
        "models rank": Command(studies.RankConfig, studies.rank, "find the one that suits some images", "photos/train"),
        "models known": Command(models.KnownConfig, models.known, "list the authors' weights, which have names"),
        "models pull": Command(
            models.PullConfig,
            models.pull,
            "copy a registered model to a folder",
            "models:/photos@champion --output photos-model",
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    return training.exit_status(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def run_job(function: Callable[[T], object], config_class: type[T], **defaults: object) -> None:
    """Call ``function`` with the config from ``defaults`` and the command line, and end the process."""
    prog = f"python {os.path.relpath(sys.argv[0])}"
    sys.exit(training.exit_status(lambda: function(parse(config_class, sys.argv[1:], prog=prog, **defaults))))


def _dispatch(args: list[str]) -> None:
    for length in (1, 2):
        name = " ".join(args[:length])
        if name in COMMANDS:
            try:
                config = parse(COMMANDS[name].config, args[length:], prog=f"bit-ray {name}")
            except SystemExit:  # after the help
                print(f"Example: {' '.join(['bit-ray', name, *COMMANDS[name].example.split()])}")
                raise
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
        hint = did_you_mean(given, COMMANDS, "did you mean ", "? ")
        raise ConfigError(f"{given}: unknown command; {hint}see bit-ray --help")


def _overview(prefix: str) -> str:
    """Return the help of the command, or of the subcommands that start with a word."""
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
