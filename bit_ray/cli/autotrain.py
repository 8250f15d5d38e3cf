"""``bit-ray train``: from a folder of images to a registered classifier."""

from bit_ray.autotrain.config import TrainConfig
from bit_ray.cli.training import print_where, scores
from bit_ray.config import DEFAULT_STORAGE
from bit_ray.progress import console, print_table


def train(config: TrainConfig) -> None:
    """Train on a folder, and print the result and the command that predicts."""
    from bit_ray.autotrain.look import look
    from bit_ray.cli.first_look import look as first_look

    if config.init:
        first_look("train from", config.init, tracking=config.tracking, storage=config.storage)
    looked = look(config)
    if config.dry_run:
        return
    from bit_ray.autotrain.train import train_on

    result = train_on(looked)
    version = result.version
    uri = f"models:/{version.name}@{version.alias}"
    rows = [
        ("registered", f"{uri}, version {version.version}"),
        ("weights", version.weights_uri),
        *scores(result.metrics),
    ]
    print_table("Result on the test images", rows)
    if result.report:
        console.print(f"Report:   {result.report}")
    print_where(config.tracking.uri, config.storage, result.run_id)
    storage = "" if config.storage == DEFAULT_STORAGE else f" --storage {config.storage}"
    console.print(f"Predict:  bit-ray predict IMAGE --model '{uri}'{storage}")
    console.print(f"Try it:   bit-ray demo '{uri}'{storage}")
