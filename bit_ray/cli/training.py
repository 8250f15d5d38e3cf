"""``bit-ray pretrain``, ``finetune``, ``evaluate``, ``replay``, and what all commands share: one-line errors."""

import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from bit_ray.cli.typed import as_typed, command
from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import BitRayError, StoppedError, root_cause
from bit_ray.evaluation.config import EvaluateConfig
from bit_ray.log_lines import JsonFormatter, StderrHandler, as_json, print_json
from bit_ray.progress import console, print_table
from bit_ray.tracking.identity import check_code
from bit_ray.training.config import FinetuneConfig, PretrainConfig, ReplayConfig

if TYPE_CHECKING:
    from bit_ray.training.driver import Trained

_NUM_WORST = 5


def exit_status(main: Callable[[], object]) -> int:
    """Run ``main`` and return the process's exit status: 2 after a user's mistake, 130 after Ctrl-C, 143 after
    SIGTERM, 141 if nobody reads the output any more, else 0.

    A user's mistake is one line on stderr, with the flag that is wrong; a bug of ours keeps its traceback.
    """
    _quieten()
    command.set(None)  # until `main` has parsed its flags
    try:
        check_code("this process")
        main()
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered
        return 141
    except Exception as error:
        wrapped_by_ray = type(error).__module__.startswith("ray.")
        cause = error if isinstance(error, BitRayError) else root_cause(error) if wrapped_by_ray else None
        if cause is None:
            raise
        print(f"error: {' '.join(str(as_typed(cause)).split())}", file=sys.stderr)
        return 2
    return 0


def _reader_is_gone() -> bool:
    """Return whether the output goes into a pipe that nobody reads any more, as after ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def pretrain(config: PretrainConfig) -> None:
    """Pre-train, and print the result."""
    from bit_ray.cli.first_look import look

    look("pretrain", "", config.shards, tracking=config.tracking, storage=config.storage)
    from bit_ray.training.pretrain import pretrain

    _print_trained(config, pretrain(config))


def finetune(config: FinetuneConfig) -> None:
    """Fine-tune, and print the result."""
    from bit_ray.cli.first_look import look

    sets = (config.shards, config.test_shards)
    look("finetune", config.init, *sets, tracking=config.tracking, storage=config.storage)
    from bit_ray.training.finetune import finetune

    _print_trained(config, finetune(config))


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate, and print the result."""
    from bit_ray.cli.first_look import look

    look("evaluate", config.model, config.shards, tracking=config.tracking, storage=config.storage)
    from bit_ray.evaluation.evaluate import evaluate, label_names

    result = evaluate(config)
    rows = [*scores(result.metrics, result.intervals), ("MLflow run", result.run_id)]
    print_table(f"{config.model} on {config.shards}", rows)
    print_where(config.tracking.uri, config.storage, result.run_id)
    if result.worst:
        names = result.class_names
        errors = [
            (item.id, label_names(item, names), names[item.predicted], f"{item.confidence:.1%}")
            for item in result.worst[:_NUM_WORST]
        ]
        print_table("Most confident errors", errors, ("id", "is", "predicted", "probability"))


def replay(config: ReplayConfig) -> None:
    """Train some steps of a run again, and print both losses."""
    from bit_ray.training.replay import replay

    result = replay(config)
    steps = f"{result.first_step}" + (f" to {result.last_step}" if result.last_step > result.first_step else "")
    difference = abs(result.replayed - result.recorded) / max(abs(result.recorded), 1e-30)
    rows = [
        ("started from", f"the checkpoint of step {result.start_step}" if result.start_step else "the fresh network"),
        ("steps", steps),
        ("loss recorded", f"{result.recorded:.9g}"),
        ("loss replayed", f"{result.replayed:.9g}"),
        ("difference", "none" if not difference else f"{difference:.2g} of it"),
        (f"loss of step {config.step}", f"{result.losses[config.step]:.9g}"),
    ]
    print_table(config.run, rows)


def _print_trained(config: PretrainConfig | FinetuneConfig, trained: "Trained | None") -> None:
    if trained is None:  # a dry run, which has printed its plan
        return
    version, metrics = trained.version, trained.result.metrics
    rows = [
        ("registered", f"models:/{version.name}@{version.alias}, version {version.version}"),
        ("weights", version.weights_uri),
        ("size", f"{version.num_bytes / 1e6:,.1f} MB, SHA-256 {version.sha256[:12]}"),
    ]
    if "train/images_seen" in metrics:
        rows.append(
            ("trained on", f"{metrics['train/images_seen']:,.0f} images, last loss {metrics['train/loss']:.4g}")
        )
    test = {name.removeprefix("test/"): value for name, value in metrics.items() if name.startswith("test/")}
    if not test and isinstance(config, FinetuneConfig):
        model = f"models:/{version.name}@{version.alias}"
        rows.append(("test", f"none was asked for: --test-shards, or bit-ray evaluate --model {model} --shards ..."))
    print_table("Result", [*rows, *scores(test)])
    print_where(config.tracking.uri, config.storage, trained.result.run_id, pictures=bool(test))
    storage = "" if config.storage == DEFAULT_STORAGE else f" --storage {config.storage}"
    console.print(f"Report:   bit-ray report 'models:/{version.name}@{version.alias}'{storage}")


def print_where(uri: str, storage: str, run_id: str, *, pictures: bool = True) -> None:
    """Print where a run's pictures are, and its page in MLflow: one line each, to be copied."""
    from bit_ray.tracking.address import tracking_uri
    from bit_ray.tracking.recorded import run_page

    page = run_page(tracking_uri(uri, storage), run_id)
    if pictures:
        console.print(f"Pictures: {page.artifacts}/evaluation")
    console.print(f"MLflow:   {page.url}")
    if page.command:
        console.print(f"          after {page.command}")


def scores(
    metrics: dict[str, float], intervals: Mapping[str, tuple[float, float]] = MappingProxyType({})
) -> list[tuple[str, str]]:
    """Return metrics as rows of a table; an interval follows its value."""

    def text(name: str, value: float) -> str:
        return f"{value:.2%}" if name in ("top_1", "top_5", "mean_per_class", "ece") else f"{value:,.4g}"

    shown = {name: text(name, value) for name, value in metrics.items()}
    for name, (low, high) in intervals.items():
        shown[name] += f"  (95 %: {text(name, low)} to {text(name, high)})"
    if "num_examples" in metrics:
        shown["num_examples"] = f"{metrics['num_examples']:,.0f}"
    return [(name.replace("_", " "), value) for name, value in shown.items()]


def _quieten() -> None:
    """Hide libraries' messages to their own developers; our warnings stay."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a future change
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("alembic", "mlflow", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("bit_ray")
    if not logger.handlers:
        handler = StderrHandler()
        handler.setFormatter(JsonFormatter() if as_json() else logging.Formatter("warning: %(message)s"))
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)
        if as_json():
            logger.propagate = False  # Ray gives the root logger a handler, too
            print_json()
