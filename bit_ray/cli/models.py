"""``bit-ray predict`` and ``bit-ray models``: use, list and copy trained models."""

import os
from dataclasses import dataclass, field
from typing import Literal

from bit_ray.cli.flags import positional
from bit_ray.demo.config import DemoConfig
from bit_ray.errors import ConfigError, DataError
from bit_ray.progress import console, follow, print_table
from bit_ray.report.config import ModelReportConfig
from bit_ray.tracking.address import registry_uri, tracking_uri
from bit_ray.tracking.config import UsesRegistry


@dataclass(frozen=True, kw_only=True)
class PredictConfig(UsesRegistry):
    """Classify images with a registered or saved model: a few on the screen, any number into a file."""

    images: tuple[str, ...] = field(metadata=positional("IMAGE ..."))
    """Image files; with --output also folders of images, s3://... or gs://..., or one shard set."""
    model: str
    """models:/NAME@ALIAS, a saved model's folder or URI, BiT weights of the authors, big_vision, timm or Hugging Face
    (.npz, .safetensors, .pth, .bin or a folder with config.json), or a name, such as bit_m_r50x1_ilsvrc2012."""
    labels: str = ""
    """File of class names, one per line, for weights that come without; empty: their folder's, or ImageNet's."""
    crop_size: int = 0
    """Side of the squares that images are resized to, pixels, for weights that come without; 0: as their names say."""
    output: str = ""
    """File to write, ending in .csv or .parquet, or folder of Parquet parts, ending in /; on every core or GPU."""
    features: bool = False
    """Write the features before the head as well; Parquet only."""
    top_k: int = 5
    """Classes to name for each image."""
    convert_images: bool = False
    """Convert grayscale, CMYK, 16-bit, alpha, palette and animated images to 8-bit RGB instead of refusing them."""
    batch_size: int = 64
    """Images per forward pass, with --output."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class ListConfig(UsesRegistry):
    """List the registered models, by name and newest first."""


@dataclass(frozen=True, kw_only=True)
class KnownConfig:
    """List the authors' weights, which --init and --model take by name and fetch once."""


@dataclass(frozen=True, kw_only=True)
class PullConfig(UsesRegistry):
    """Copy a registered model to a folder, verified, for use without a registry."""

    model: str = field(metadata=positional("MODEL"))
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    output: str
    """New or empty folder."""


def report(config: ModelReportConfig) -> None:
    """Write the page of a model."""
    _look_at("report on", config)
    from bit_ray.report.write import report_model

    path = report_model(config)
    console.print(f"Page: {path} ({path.stat().st_size / 1e6:.1f} MB), one file that can be mailed")


def demo(config: DemoConfig) -> None:
    """Serve a page for trying a model."""
    _look_at("demo of", config)
    from bit_ray.demo.serve import serve

    serve(config)


def _look_at(verb: str, config: ModelReportConfig | DemoConfig) -> None:
    """Check the model before PyTorch is imported; a run's name is enough for it."""
    from bit_ray.cli.first_look import look
    from bit_ray.inference.named import saved_model

    look(verb, saved_model(config.model, config.storage), tracking=config.tracking, storage=config.storage)


def predict(config: PredictConfig) -> None:
    """Print the most probable classes of image files."""
    if not config.images:
        raise ConfigError.of("images", "missing", "one or more image files", "see bit-ray predict --help")
    if config.output:
        _predict_into_file(config)
        return
    if config.features:
        raise ConfigError.of("features", "given without output", "with a file to write to", "add --output FILE.parquet")
    from bit_ray.inference.inputs import is_folder

    for image in config.images:
        if is_folder(image):
            raise ConfigError(f"{image}: a folder; accepted: image files; for folders add --output FILE.csv")
    _look(config)
    if not any(os.path.exists(image) for image in config.images):
        others = f", nor the {len(config.images) - 1} others" if len(config.images) > 1 else ""
        raise DataError(f"{config.images[0]}: no such file{others}; accepted: image files; check the path")
    import torch

    from bit_ray.inference.classifier import load_model

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(
        config.model,
        tracking_uri=_registry_of(config),
        device=device,
        labels=config.labels,
        crop_size=config.crop_size,
    )
    rows: list[tuple[str, str, str]] = []
    refused: list[DataError] = []
    for image in config.images:
        try:
            [prediction] = model.predict(image, config.top_k, convert=config.convert_images)
        except DataError as error:
            refused.append(error)
            rows.append((image, str(error).removeprefix(f"images[0] ({image}): "), ""))
            continue
        for i, (name, probability) in enumerate(prediction):
            rows.append((image if i == 0 else "", name, f"{probability:.1%}"))
    if len(refused) < len(config.images):
        print_table(config.model, rows, ("image", "class", "probability"))
    if refused:
        raise refused[0]


def _look(config: PredictConfig) -> None:
    from bit_ray.cli.first_look import look

    look("predict with", config.model, tracking=config.tracking, storage=config.storage)


def _predict_into_file(config: PredictConfig) -> None:
    _look(config)
    from bit_ray.data.sources.endings import named
    from bit_ray.inference.outputs import check_output

    check_output(config.output, config.features)  # before the model is fetched
    from bit_ray.inference.classifier import load_model
    from bit_ray.inference.predict import predict_folder

    model = load_model(
        config.model, tracking_uri=_registry_of(config), labels=config.labels, crop_size=config.crop_size
    )
    with follow("predict") as progress:
        report = predict_folder(
            config.images,
            model,
            config.output,
            top_k=config.top_k,
            features=config.features,
            convert=config.convert_images,
            batch_size=config.batch_size,
            device=config.device,
            progress=progress,
        )
    rows = [
        ("images", f"{report.num_images:,}"),
        ("unreadable", f"{report.num_unreadable:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in report.reasons),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    if report.num_features:
        rows.insert(1, ("features", f"{report.num_features:,} per image"))
    if report.others:
        rows.append(("other files left out", named(report.others)))
    print_table(report.output, rows)
    if report.num_unreadable == report.num_images:
        raise DataError(
            f"{report.output}: none of {report.num_images:,} images could be read; accepted: at least one; see its "
            "column error, and delete it before the next try"
        )


def _registry_of(config: PredictConfig) -> str | None:
    """Return the URI of the registry if the model is registered; otherwise MLflow need not be loaded."""
    return tracking_uri(config.tracking.uri, config.storage) if config.model.startswith("models:/") else None


def known(config: KnownConfig) -> None:
    """Print the authors' weights."""
    from bit_ray.weights.known import known_weights

    everything = known_weights()
    rows = [
        (
            weights.name,
            weights.trained_on,
            f"{weights.num_classes:,}",
            f"{weights.image_size}",
            f"{weights.top_1:.1%}" if weights.top_1 else "",
            f"{weights.num_bytes / 1e6:,.0f}",
            "yes" if weights.path.is_file() else "",
        )
        for weights in everything
    ]
    header = ("name", "trained on", "classes", "pixels", "ImageNet top-1", "MB", "here")
    print_table("The authors' weights, Apache-2.0", rows, header)
    console.print(
        "top-1: timm's evaluation of the same files. Others by timm/NAME and hf://ORG/NAME, with @REVISION if wanted.\n"
        f"Fetched once, into {everything[0].path.parent}"
    )


def list_models(config: ListConfig) -> None:
    """Print the registered models."""
    from bit_ray.uris import shown

    registry = registry_uri(tracking_uri(config.tracking.uri, config.storage))
    console.print(f"Registry: {shown(registry)}")
    from bit_ray.tracking.listing import read_embedded

    models = read_embedded(registry)
    if models is None:
        from bit_ray.tracking.registry import list_models

        models = list_models(registry)
    if not models:
        console.print("no models yet; bit-ray pretrain and bit-ray finetune register what they train")
        return
    rows = [
        (
            model.name,
            str(model.version),
            ", ".join(model.aliases),
            model.model,
            f"{model.num_classes:,}",
            f"{model.num_bytes / 1e6:,.1f}",
            f"{model.created:%Y-%m-%d}",
        )
        for model in models
    ]
    print_table("Registered models", rows, ("name", "version", "alias", "network", "classes", "MB", "date"))


def pull(config: PullConfig) -> None:
    """Copy a registered model."""
    from bit_ray.cli.first_look import look

    look("pull", config.model, tracking=config.tracking, storage=config.storage)
    from bit_ray.tracking.registry import pull

    folder = pull(config.model, config.output, tracking_uri(config.tracking.uri, config.storage))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    print_table(f"{config.model} in {folder}", [(path.name, f"{path.stat().st_size:,} bytes") for path in files])
