"""A network as a standalone program: ONNX, or a ``.pt2`` of `torch.export`, for any batch and image size.

Weight standardization is done once, here: the program has plain convolutions. Its input ``pixels`` is
``[B, 3, H, W] float32`` in the range that the metadata gives, H and W at least 32; its output ``logits`` is
``[B, num_classes] float32``. The metadata's ``bit_ray.spec`` is our `ModelSpec` as JSON: class names, preprocessing,
origin. Reading and writing ONNX needs the ``export`` extra.
"""

import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.nn import functional

from bit_ray.config import from_dict, to_dict
from bit_ray.errors import ConfigError, ModelError
from bit_ray.locks import whole
from bit_ray.models.network import Network
from bit_ray.weights.package import ModelSpec
from bit_ray.weights.read import SPEC_KEY

ExportFormat = Literal["onnx", "torch"]
SUFFIX: dict[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2"}

_OPSET = 20
_ALL_BUT_ZERO = 1e-30
_LARGEST_PROTOBUF = 1_900_000_000  # protobuf itself stops at 2 GiB
_LARGEST_BATCH, _LARGEST_SIDE = 65_536, 16_384


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to 8 bits, symmetric, with one scale for each output.

    Args:
        weight: ``[O, ...] float32``.

    Returns:
        ``[O, ...] int8`` in -127..127 and scales ``[O] float32``; their product is nearest to ``weight``.
    """
    scale = weight.abs().flatten(1).amax(dim=1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round()
    return rounded.to(torch.int8), scale


def export(
    model: Network, spec: ModelSpec, path: str | os.PathLike[str], to: ExportFormat, *, int8: bool = False
) -> None:
    """Write a network as a program.

    Args:
        model: The network.
        spec: What it is, for the metadata.
        path: File, ``.onnx`` or ``.pt2``. ONNX of more than 2 GB has its weights in a file next to it.
        to: ``onnx``, or ``torch`` for `torch.export`.
        int8: Keep the weights of convolutions and classifier in 8 bits, one scale per output channel; activations and
            arithmetic stay float32. A quarter of the size.

    Raises:
        ConfigError: The file's name has another ending.
        ModelError: The path is not writable, or a package is missing.
    """
    path = Path(path)
    if path.suffix != SUFFIX[to]:
        raise ConfigError.of("output", path, f"a name that ends in {SUFFIX[to]} for {to}", "rename it")
    baked = model.baked()
    metadata = {
        SPEC_KEY: json.dumps(to_dict(spec), ensure_ascii=False),
        "bit_ray.weights": "int8" if int8 else "float32",
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if to == "torch":
            program = _trace(_with_int8(baked) if int8 else baked)
            with whole(path) as unfinished:
                _save_torch(program, metadata, unfinished)
        else:
            _save_onnx(_onnx(baked, int8), path, metadata)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror}); choose a writable folder") from None


@dataclass(frozen=True)
class Exported:
    """An exported program ready to run."""

    spec: ModelSpec
    """What it is."""
    logits: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
    """Map ``[B, 3, H, W] float32`` in the spec's input range to ``[B, num_classes] float32``."""
    num_bytes: int
    """Size of its files, bytes."""


def load_exported(path: str | os.PathLike[str]) -> Exported:
    """Load an exported program, ``.onnx`` with onnxruntime and ``.pt2`` with PyTorch, on the CPU.

    Unlike weights, a ``.pt2`` is a program, and PyTorch runs code in it: open only files that you made or trust.

    Raises:
        ModelError: It is missing, damaged or not ours, or onnxruntime is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; accepted: an exported model; check the path")
    try:
        if path.suffix == ".onnx":
            session = _need("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
            metadata = dict(session.get_modelmeta().custom_metadata_map)

            def logits(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
                result: npt.NDArray[np.float32] = session.run(["logits"], {"pixels": pixels})[0]
                return result
        else:
            files = {SPEC_KEY: ""}
            program = torch.export.load(path, extra_files=files).module()
            metadata = dict(files)

            @torch.inference_mode()
            def logits(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
                result: npt.NDArray[np.float32] = program(torch.from_numpy(pixels)).numpy()
                return result

        spec = from_dict(ModelSpec, json.loads(metadata.get(SPEC_KEY) or "{}"))
    except ModelError:
        raise
    except Exception as error:  # each library has its own errors for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not a model that bit_ray exported ({reason}); export it again") from None
    data_path = path.with_name(path.name + ".data")
    num_bytes = sum(file.stat().st_size for file in (path, data_path) if file.is_file())
    return Exported(spec, logits, num_bytes)


class _Logits(nn.Module):
    """The forward pass with the program's name for its input."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixels)
        return logits


class _Int8(nn.Module):
    """A convolution or linear layer that keeps its weights in 8 bits."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(layer.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(-1, *[1] * (weight.ndim - 1)))
        self.register_buffer("bias", layer.bias)
        self.padding: Any = layer.padding if isinstance(layer, nn.Conv2d) else None
        self.stride: Any = layer.stride if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() * self.scale
        if self.stride is None:
            return functional.linear(x, weight, self.bias)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def _with_int8(baked: Network) -> Network:
    for name, module in list(baked.named_modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            baked.set_submodule(name, _Int8(module))
    return baked


def _dynamic_shapes(least: int) -> dict[str, dict[int, Any]]:
    return {
        "pixels": {
            0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH),
            2: torch.export.Dim("height", min=least, max=_LARGEST_SIDE),
            3: torch.export.Dim("width", min=least, max=_LARGEST_SIDE),
        }
    }


def _trace(baked: Network) -> torch.export.ExportedProgram:
    # With this setting the tracer allows sizes of 1, which images of 32 pixels have after stage 4. torch.export has no
    # public name for it.
    shapes = _dynamic_shapes(baked.config.min_image_size)
    with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(_Logits(baked), (torch.zeros(2, 3, 80, 96),), dynamic_shapes=shapes)


def _save_torch(program: torch.export.ExportedProgram, metadata: dict[str, str], target: Path) -> None:
    # Through memory: PyTorch's writer ends the whole process if the disk is full.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=metadata)
    target.write_bytes(buffer.getbuffer())


def _onnx(baked: Network, int8: bool) -> Any:
    """Return the program as an ``onnx.ModelProto``."""
    for name in ("onnx", "onnxscript"):
        _need(name)
    # onnxruntime merges a padding by zeros into the pooling after it, where it becomes a padding by -inf. It does not
    # merge a padding by a value that is only nearly zero.
    for name, module in list(baked.named_modules()):
        if isinstance(module, nn.ZeroPad2d):
            baked.set_submodule(name, nn.ConstantPad2d(module.padding, _ALL_BUT_ZERO))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _trace(baked), input_names=["pixels"], output_names=["logits"], opset_version=_OPSET, dynamo=True
        )
    assert program is not None
    proto = program.model_proto
    if int8:
        _quantize_onnx(proto)
    return proto


def _quantize_onnx(proto: Any) -> None:
    """Replace the weights of convolutions and classifier by int8 and a DequantizeLinear each."""
    onnx = _need("onnx")
    graph = proto.graph
    indices = {initializer.name: i for i, initializer in enumerate(graph.initializer)}
    nodes, replaced = [], set()
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in indices:
            name = node.input[1]
            assert node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
            if name not in replaced:
                weight = torch.from_numpy(onnx.numpy_helper.to_array(graph.initializer[indices[name]]).copy())
                rounded, scale = quantize(weight)
                graph.initializer[indices[name]].CopyFrom(onnx.numpy_helper.from_array(rounded.numpy(), f"{name}_int8"))
                graph.initializer.append(onnx.numpy_helper.from_array(scale.numpy(), f"{name}_scale"))
                nodes.append(
                    onnx.helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], axis=0)
                )
                replaced.add(name)
        nodes.append(node)
    assert replaced
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [info for info in graph.value_info if info.name not in replaced]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _save_onnx(proto: Any, path: Path, metadata: dict[str, str]) -> None:
    onnx = _need("onnx")
    onnx.helper.set_model_props(proto, metadata)
    proto.producer_name = "bit_ray"
    if sum(len(initializer.raw_data) for initializer in proto.graph.initializer) < _LARGEST_PROTOBUF:
        with whole(path) as unfinished:
            unfinished.write_bytes(proto.SerializeToString())
        return
    # The program comes last: without it, the weights next to it are not a model.
    data_path = path.with_name(path.name + ".data")
    onnx.external_data_helper.convert_model_to_external_data(proto, location=data_path.name)
    data_path.unlink(missing_ok=True)
    with whole(path) as unfinished:
        onnx.save_model(proto, str(unfinished), format="protobuf")


def _need(name: str) -> ModuleType:
    """Import a package of the ``export`` extra."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ModelError(
            f"{name}: not installed, but needed for ONNX; run pip install onnx onnxruntime onnxscript"
        ) from None
