"""Write a model of grouped integers in the format that vLLM and SGLang run with their own kernels.

``pack-quantized`` of compressed-tensors: the same codes, scales and zero points, packed otherwise.
A weight is ``scale · (code - zero_point)`` in both, so nothing is lost.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmpress.core.artifacts import artifact_folder, claim, write_json
from llmpress.core.devices import pick_dtype
from llmpress.core.errors import ArtifactError
from llmpress.core.progress import progress
from llmpress.export.older import name_older_tokenizer, with_older_names
from llmpress.models.architectures import compressed_linear
from llmpress.models.checkpoints.compressed import KEY, compressed_layers, model_config
from llmpress.models.checkpoints.dense_view import stored_layer
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter, copy_companions
from llmpress.models.experts import expert_matrix
from llmpress.models.folders import model_folder
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.nn.packing import unpack

WIDTHS = (4, 8)
"""Bits of a code that engines have kernels for."""
WORD = 32


def export_packed(
    model: Path | str,
    *,
    out: Path | str,
    dtype: torch.dtype | str = torch.float16,
    force: bool = False,
) -> Path:
    """Write a model compressed by rtn or gptq as compressed-tensors' ``pack-quantized``.

    Codes of a row lie eight or four to an int32, the first in the lowest bits; zero points are
    packed along the rows. Linears that are not compressed are listed as ``ignore``.

    Args:
        model: A model compressed to 4 or 8 bits in groups.
        out: Folder to write: config.json, safetensors, tokenizer.
        dtype: What everything that is not packed is stored in. Scales are fp16 in an artifact, so
            another dtype rounds them.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: A damaged folder, a layer that this format cannot hold, which is named, or
            ``out`` exists.
        ConfigError: Another dtype than bfloat16, float16 and float32.
    """
    out, dtype = Path(out), pick_dtype(dtype)
    source = Checkpoint(model_folder(model))
    settings = {"dtype": str(dtype).removeprefix("torch."), "form": "compressed-tensors"}
    inputs = {"model": source.folder}
    entries = compressed_layers(source)
    if not entries:
        raise ArtifactError(f"{source.folder}: is not compressed; compress it with rtn or gptq")
    with (
        claim(out, force=force, inputs=inputs.values()) as target,
        artifact_folder(target, stage="export", settings=settings, inputs=inputs) as folder,
    ):
        writer, skeleton = CheckpointWriter(folder), source.skeleton()
        groups: dict[tuple[int, int], list[str]] = {}
        for name, entry in progress(sorted(entries.items()), "export"):
            layer = stored_layer(name, entry, compressed_linear(name, skeleton), source)
            if not isinstance(layer, QuantizedLinear):
                problem = f"is stored as {layer.kind}, not as integers in groups (rtn, gptq)"
                raise ArtifactError(f"{source.folder}: {name} {problem}; --dense writes any model")
            if reason := _problem(name, layer):
                raise ArtifactError(f"{source.folder}: {name} {reason}; --dense writes any model")
            groups.setdefault((layer.num_bits, layer.group_size), []).append(name)
            for part, tensor in _tensors(layer, dtype).items():
                writer.add(f"{name}.{part}", tensor)
        for name in source.names():
            if name.rpartition(".")[0] not in entries:
                tensor = source.tensor(name)
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        writer.close()
        linears = (n for n, module in skeleton.named_modules() if isinstance(module, nn.Linear))
        said = _quantization(groups, [name for name in linears if name not in entries])
        config = with_older_names(model_config(source, dtype))
        write_json(folder / "config.json", config | {KEY: said})
        copy_companions(source.folder, folder)
        name_older_tokenizer(folder)
    return out


def _problem(name: str, layer: QuantizedLinear) -> str | None:
    """Return why compressed-tensors, or who runs it, cannot have a layer; None where it can."""
    if layer.num_bits not in WIDTHS:
        return f"has {layer.num_bits} bits, engines run {' and '.join(map(str, WIDTHS))}"
    if layer.in_features % layer.group_size:
        return f"has {layer.in_features} inputs, no multiple of its groups of {layer.group_size}"
    if layer.out_features % (WORD // layer.num_bits):
        return f"has {layer.out_features} outputs, whose zero points fill no whole words"
    return "is one expert's matrix, which engines store otherwise" if expert_matrix(name) else None


def _tensors(layer: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is stored of a layer, by the end of its name."""
    shape, bits = (layer.out_features, layer.in_features), layer.num_bits
    codes = unpack(layer.codes, bits, layer.num_weights).view(shape)
    zeros = unpack(layer.zero_points, bits, layer.scales.numel()).view_as(layer.scales)
    made = {
        "weight_packed": _words(codes, bits),
        "weight_scale": layer.scales.detach().to(dtype),
        "weight_zero_point": _words(zeros.T, bits).T.contiguous(),
        "weight_shape": torch.tensor(shape),
    }
    return made if layer.bias is None else made | {"bias": layer.bias.detach().to(dtype)}


def _words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[rows, n]`` into int32 ``[rows, ceil(n · bits / 32)]``, the first lowest."""
    per_word = WORD // bits
    padded = functional.pad(codes.long(), (0, -codes.shape[1] % per_word))
    shifts = bits * torch.arange(per_word)
    words = (padded.view(len(codes), -1, per_word) << shifts).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).int()


def _quantization(
    groups: Mapping[tuple[int, int], list[str]], ignored: list[str]
) -> dict[str, Any]:
    """Return config.json's ``quantization_config``."""
    whole = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{index}": {
                "targets": ["Linear"] if whole else names,
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": size,
                    "dynamic": False,
                    "actorder": None,
                },
            }
            for index, ((bits, size), names) in enumerate(groups.items())
        },
    }
