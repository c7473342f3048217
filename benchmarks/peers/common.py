"""What every peer's script shares: the same calibration in, one dense folder and peer.json out.

Runs in each peer's own environment: torch, transformers and safetensors, but not llmpress.
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

MODEL = Path("studies/quality/data/models/smollm2")
CALIBRATION = Path("studies/quality/data/calibration/smollm2/windows.safetensors")
OUT = Path("build/peers/out")
PACKED = Path("build/peers/packed")


def calibration_windows() -> torch.Tensor:
    """Return the token ids that every calibrated peer gets, int64 ``[windows, length]``."""
    return load_file(CALIBRATION)["calibration"]


def load_dense(folder: Path = MODEL) -> Any:
    """Load a dense model in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()


def linears() -> dict[str, torch.Tensor]:
    """Return the weights of the linear layers of the decoder blocks by module name, fp32."""
    tensors = load_file(MODEL / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.") and tensor.ndim == 2
    }


def once(packed: Path, quantize_and_save: Callable[[], object]) -> float:
    """Return the seconds that a packed checkpoint took, made now unless it is there already."""
    note = packed.parent / f"{packed.name}.seconds"
    if not note.is_file():
        started = perf_counter()
        quantize_and_save()
        note.write_text(f"{perf_counter() - started:.1f}", encoding="utf-8")
    return float(note.read_text(encoding="utf-8"))


def packed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def packed_bits(folder: Path) -> int:
    """Return the bits that a packed checkpoint stores for the linear layers.

    All tensors whose names start with a layer's count: codes, scales, zero points, orders, shapes.
    A layer that the tool left dense counts with all its bits; one that has no tensor is an error.
    """
    return tensor_bits(packed_tensors(folder))


def tensor_bits(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bits of all tensors that belong to the linear layers, by their names."""
    total = 0
    for layer in linears():
        held = [t for name, t in tensors.items() if name.startswith(f"{layer}.")]
        if not held:
            raise SystemExit(f"error: the packed checkpoint holds nothing for {layer}")
        total += sum(8 * t.numel() * t.element_size() for t in held)
    return total


def gptq_weights(folder: Path, num_bits: int, *, zero_offset: bool) -> dict[str, torch.Tensor]:
    """Dequantize a checkpoint in GPTQ's layout: codes and zero points in words of 32 bits.

    Args:
        folder: With ``qweight [in * b / 32, out]``, ``qzeros [groups, out * b / 32]``,
            ``scales [groups, out]`` and, in some, ``g_idx [in]`` for every layer.
        num_bits: b, the width of a code; three words hold 32 codes of three bits.
        zero_offset: Whether zero points are stored less 1, as in the layout's first version.

    Returns:
        Weights ``[out, in]`` by layer, fp32.
    """
    tensors, weights = packed_tensors(folder), {}
    for name, original in linears().items():
        codes = unpack_words(tensors[f"{name}.qweight"].T, num_bits).T  # [in, out]
        words = tensors[f"{name}.qzeros"]
        if zero_offset and 32 % num_bits == 0:  # 1 was taken off every code of a word, in one go
            words = words + sum(1 << shift for shift in range(0, 32, num_bits))
        zeros = unpack_words(words, num_bits)  # [groups, out]
        scales = tensors[f"{name}.scales"].float()
        num_in, num_out = original.shape[1], original.shape[0]
        codes, zeros = codes[:num_in, :num_out], zeros[:, :num_out]
        if zero_offset and 32 % num_bits:
            zeros = (zeros + 1) & (2**num_bits - 1)
        order = tensors.get(f"{name}.g_idx")
        if order is None:
            order = torch.arange(num_in) // -(-num_in // len(scales))
        order = order.long()
        weights[name] = ((codes - zeros[order]) * scales[order]).T.contiguous()
    return weights


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each of a word's four-bit fields holds, the lowest first."""


def awq_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantize a checkpoint in AWQ's layout: eight outputs of four bits in a word.

    Args:
        folder: With ``qweight [in, out / 8]``, ``qzeros [groups, out / 8]`` and
            ``scales [groups, out]`` for every layer.

    Returns:
        Weights ``[out, in]`` by layer, fp32.
    """
    tensors, weights = packed_tensors(folder), {}
    place = torch.tensor(AWQ_ORDER).argsort()
    for name in linears():
        codes, zeros = (
            unpack_words(tensors[f"{name}.{kind}"], 4).unflatten(1, (-1, 8))[..., place].flatten(1)
            for kind in ("qweight", "qzeros")
        )  # [in, out], [groups, out]
        scales = tensors[f"{name}.scales"].float()
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
        weights[name] = ((codes - zeros[group]) * scales[group]).T.contiguous()
    return weights


def unpack_words(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Unpack int32 ``[N, W]`` into codes ``[N, 32 W / b]``, the lowest bits of a word first."""
    bits = (words.contiguous()[..., None] >> torch.arange(32, dtype=torch.int32)) & 1  # [N, W, 32]
    bits = bits.reshape(len(words), -1, num_bits)
    return (bits << torch.arange(num_bits, dtype=torch.int32)).sum(-1)


def check_levels(weights: Mapping[str, torch.Tensor], num_bits: int, group_size: int) -> int:
    """Return the most distinct values in a group of a row; more than ``2^num_bits`` is an error."""
    most = 0
    for name, weight in weights.items():
        groups, _ = weight.reshape(-1, group_size).sort(dim=1)
        most = max(most, int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1)
        if most > 2**num_bits:
            raise SystemExit(f"error: {name}: {most} values in a group of {num_bits} bits")
    return most


def export(
    name: str,
    *,
    method: str,
    settings: Mapping[str, Any],
    nominal_bits: float,
    weights: Mapping[str, torch.Tensor],
    stored_bits: int,
    seconds: float,
    calibration_tokens: int,
    packages: tuple[str, ...],
    logits: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    """Write the dense folder and peer.json, after the dense model was held against the peer's own.

    Args:
        name: Of the folder below build/peers/out.
        method: Name and version of the tool.
        settings: All that was chosen.
        nominal_bits: The width of a code.
        weights: Dequantized weights of all linear layers, fp32.
        stored_bits: Of the packed layers.
        seconds: Wall time of the compression, saving included.
        calibration_tokens: 0 for a tool that needs none.
        packages: Whose versions are recorded.
        logits: The peer's own quantized model, tokens to logits; None where it cannot run here.
    """
    original = linears()
    if weights.keys() != original.keys():
        raise SystemExit(f"error: not all layers: {sorted(original.keys() - weights.keys())[:3]}")
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL.iterdir():
        if file.name not in ("model.safetensors", "provenance.json", "source.json"):
            shutil.copyfile(file, folder / file.name)
    tensors = load_file(MODEL / "model.safetensors")
    for layer, weight in weights.items():
        if weight.shape != original[layer].shape:
            raise SystemExit(f"error: {layer}: {list(weight.shape)}")
        tensors[f"{layer}.weight"] = weight.float().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = sum(float((weights[k] - w).square().sum()) for k, w in original.items())
    total = sum(float(w.square().sum()) for w in original.values())
    num_weights = sum(w.numel() for w in original.values())
    record = {
        "method": method,
        "settings": dict(settings),
        "nominal_bits": nominal_bits,
        "stored_bits": stored_bits,
        "compressed_weights": num_weights,
        "relative_weight_error": error / total,
        "seconds": round(seconds, 1),
        "calibration_tokens": calibration_tokens,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads, busy",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if logits is not None:
        record["export_check"] = _difference(folder, logits)
    (folder / "peer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{name}: {stored_bits / num_weights:.3f} bits, {json.dumps(record)}", flush=True)


@torch.inference_mode()
def _difference(folder: Path, logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
    """Return how far the peer's own logits are from the dense folder's and from the original's."""
    tokens = calibration_windows()[:1, :64]
    theirs = logits(tokens).float()
    dense, original = (load_dense(f)(tokens).logits for f in (folder, MODEL))
    return {
        "rms_to_dense_export": float((theirs - dense).square().mean().sqrt()),
        "rms_to_original": float((theirs - original).square().mean().sqrt()),
        "same_top1": float((theirs.argmax(-1) == dense.argmax(-1)).float().mean()),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
