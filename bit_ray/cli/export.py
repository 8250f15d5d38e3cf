"""``bit-ray models export``: models for other programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bit_ray.cli.flags import positional
from bit_ray.errors import ConfigError
from bit_ray.progress import print_table
from bit_ray.tracking.config import UsesRegistry

if TYPE_CHECKING:
    from bit_ray.inference.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class ExportConfig(UsesRegistry):
    """Write a model for other programs: as a standalone program, or as weights under their names."""

    model: str = field(metadata=positional("MODEL"))
    """models:/NAME@ALIAS, a saved model's folder or URI, or BiT weights of the authors, big_vision, timm or Hugging
    Face: .npz, .safetensors, .pth, .bin or a folder with config.json."""
    output: str
    """File that ends in .onnx, .pt2 (torch), .npz or .safetensors; for timm, huggingface and package a new folder."""
    format: Literal["onnx", "torch", "npz", "safetensors", "timm", "huggingface", "package"]
    """What to write; torch: a program of torch.export; package: a saved model of bit-ray."""
    labels: str = ""
    """File of class names, one per line, for weights that come without; empty: their folder's, or ImageNet's."""
    crop_size: int = 0
    """Side of the squares that images are resized to, pixels, for weights that come without; 0: as their names say."""
    int8: bool = False
    """Keep the weights of a program in 8 bits, a quarter of the size; --shards shows what that costs."""
    shards: str = ""
    """Shard set to run the program on, next to the model, best of the model's classes."""
    num_images: int = 1000
    """Images of it, from the first."""
    rescale: bool = False
    """timm and huggingface: multiply kernels by 10, so that their larger eps changes nothing even where kernels are
    tiny; not for training on."""

    def __post_init__(self) -> None:
        program = self.format in ("onnx", "torch")
        if not program:
            for name, given in (("int8", self.int8), ("shards", bool(self.shards))):
                if given:
                    raise ConfigError.of(
                        name, f"given with format {self.format}", "with onnx and torch", "leave it out"
                    )
        if self.int8 and not self.shards:
            accepted, remedy = "a shard set to measure the loss on", "write one with bit-ray shards write"
            raise ConfigError.of("shards", "empty with int8", accepted, remedy)
        if self.num_images < 1:
            raise ConfigError.of("num_images", self.num_images, "at least 1", "for example 1000")


def export_model(config: ExportConfig) -> None:
    """Write a model for other programs, and print what it is and how it compares."""
    from bit_ray.cli.first_look import look

    look("export", config.model, config.shards, tracking=config.tracking, storage=config.storage)
    from bit_ray.inference.classifier import load_model
    from bit_ray.tracking.address import tracking_uri
    from bit_ray.weights.folders import timm_name
    from bit_ray.weights.write import eps_effect, write_weights

    registry = tracking_uri(config.tracking.uri, config.storage)
    model = load_model(config.model, tracking_uri=registry, labels=config.labels, crop_size=config.crop_size)
    spec = model.spec
    rows = [("network", f"{spec.model}, {spec.num_classes:,} classes")]
    if config.format == "onnx" or config.format == "torch":
        from bit_ray.weights.export import export

        export(model.model, spec, config.output, config.format, int8=config.int8)
        low, high = spec.input_range
        rows += [
            ("input", f"pixels: [B, 3, H, W] float32, RGB from {low:g} to {high:g}, H and W from 32"),
            ("output", f"logits: [B, {spec.num_classes}] float32"),
            ("weights", "int8, one scale per output channel" if config.int8 else "float32"),
        ]
    else:
        write_weights(model.model, spec, config.output, config.format, rescale=config.rescale)
        if config.format in ("timm", "huggingface") and not config.rescale:
            rows.append(
                ("their eps of 1e-8", f"changes filters by at most {eps_effect(model.model):.1g} of their size")
            )
        if config.format == "timm":
            name = timm_name(spec.model)
            rows.append(("timm's name", name or "none for this size; timm's class ResNetV2 can load the weights"))
    rows += [("written", config.output), ("size", f"{_num_bytes(Path(config.output)) / 1e6:,.1f} MB")]
    if config.shards:
        rows += _compared(config, model)
    print_table(config.model, rows)


def _compared(config: ExportConfig, model: "Classifier") -> list[tuple[str, str]]:
    from bit_ray.inference.exported import compare
    from bit_ray.weights.export import load_exported

    found = compare(model, load_exported(config.output), config.shards, config.num_images)
    rows = [
        ("compared on", f"{found.num_examples:,} images of {config.shards}"),
        ("same class", f"{found.agreement:.2%}"),
        (
            "logits",
            f"differ by {found.mean_difference:.2g}, at most {found.largest_difference:.2g}; their spread "
            f"is {found.spread:.2g}",
        ),
    ]
    if found.top_1 is None:
        rows.append(("top-1", "unknown: the set has other classes, or several per image"))
    else:
        before, after = found.top_1
        rows.append(("top-1", f"{after:.2%}; the model's {before:.2%}, loss {100 * (before - after):.2f} points"))
    return rows


def _num_bytes(path: Path) -> int:
    data_path = path.with_name(path.name + ".data")  # ONNX keeps weights of more than 2 GB there
    files = path.iterdir() if path.is_dir() else [file for file in (path, data_path) if file.is_file()]
    return sum(file.stat().st_size for file in files)
