"""What every peer's script shares: a job in, a dense folder and peer.json out.

Runs in each peer's own environment: torch, transformers and safetensors, but not llmpress.
"""

import inspect
import json
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BF16_BYTES = 2
NOT_COPIED = {"model.safetensors.index.json", "provenance.json", "source.json"}


class Job:
    """One peer's run: what it is given and where its result goes.

    Args:
        model: Folder of the original, dense.
        calibration: Folder of its calibration.
        out: Folder for the dense checkpoint and peer.json.
        packed: Folder for the tool's own checkpoint; removed afterwards.
    """

    def __init__(self, model: str, calibration: str, out: str, packed: str) -> None:
        self.model, self.out, self.packed = Path(model), Path(out), Path(packed)
        self._calibration = Path(calibration)
        self.seconds = 0.0

    @cached_property
    def windows(self) -> torch.Tensor:
        """The token ids that every calibrated peer gets, int64 ``[windows, length]``."""
        return load_file(self._calibration / "windows.safetensors")["calibration"]

    @cached_property
    def original(self) -> dict[str, torch.Tensor]:
        """All tensors of the original."""
        return tensors_of(self.model)

    @cached_property
    def linears(self) -> dict[str, torch.Tensor]:
        """The weights of the linear layers of the decoder blocks by module name, fp32."""
        return {
            name.removesuffix(".weight"): tensor.float()
            for name, tensor in self.original.items()
            if name.startswith("model.layers.") and tensor.ndim == 2
        }

    def load_dense(self, folder: Path | None = None) -> Any:
        """Load a dense model in fp32, the original without a folder."""
        return AutoModelForCausalLM.from_pretrained(
            folder or self.model, dtype=torch.float32, local_files_only=True
        ).eval()

    def timed(self, quantize: Callable[[], object]) -> None:
        """Quantize and note the seconds."""
        started = perf_counter()
        quantize()
        self.seconds = perf_counter() - started

    def bits(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Return the bits of all tensors that belong to the linear layers, by their names.

        All whose names start with a layer's count: codes, scales, zero points, orders, shapes. A
        layer that the tool left dense counts with all its bits; one without a tensor is an error.
        """
        total = 0
        for layer in self.linears:
            held = [t for name, t in tensors.items() if name.startswith(f"{layer}.")]
            if not held:
                raise SystemExit(f"error: the packed checkpoint holds nothing for {layer}")
            total += sum(8 * t.numel() * t.element_size() for t in held)
        return total

    def write(self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None) -> None:
        """Write a dense checkpoint with the original's other files.

        Args:
            tensors: All of them.
            config: Of config.json; the original's without one.
        """
        for file in self.model.iterdir():
            if file.suffix != ".safetensors" and file.name not in NOT_COPIED and file.is_file():
                shutil.copyfile(file, self.out / file.name)
        save_file(dict(tensors), self.out / "model.safetensors", metadata={"format": "pt"})
        if config:
            (self.out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def note(self, stored_bits: int, packages: tuple[str, ...], **more: Any) -> None:
        """Write peer.json: true bits, seconds, versions and whatever else is known."""
        weights = sum(weight.numel() for weight in self.linears.values())
        model_weights = sum(tensor.numel() for tensor in self.original.values())
        record = {
            "stored_bits": stored_bits,  # of the linear layers
            "compressed_weights": weights,
            "model_weights": model_weights,
            "model_bytes": stored_bits // 8 + BF16_BYTES * (model_weights - weights),
            "seconds": round(self.seconds, 1),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            **more,
        }
        (self.out / "peer.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{stored_bits / weights:.3f} bits, {json.dumps(record)}", flush=True)

    def export(
        self,
        weights: Mapping[str, torch.Tensor],
        stored_bits: int,
        *,
        packages: tuple[str, ...],
        logits: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """Write the dense folder and peer.json, after it was held against the peer's own model.

        Args:
            weights: Dequantized weights of all linear layers, fp32.
            stored_bits: Of the packed layers.
            packages: Whose versions are recorded.
            logits: The peer's own quantized model, tokens to logits; None where it cannot run here.
        """
        if missing := sorted(self.linears.keys() ^ weights.keys()):
            raise SystemExit(f"error: not the original's layers: {missing[:3]}")
        tensors = dict(self.original)
        for layer, weight in weights.items():
            if weight.shape != self.linears[layer].shape:
                raise SystemExit(f"error: {layer}: {list(weight.shape)}")
            tensors[f"{layer}.weight"] = weight.float().contiguous()
        self.write(tensors, None)
        error = sum(float((weights[k] - w).square().sum()) for k, w in self.linears.items())
        total = sum(float(w.square().sum()) for w in self.linears.values())
        more: dict[str, Any] = {"relative_weight_error": error / total}
        if logits is not None:
            more["export_check"] = self._difference(logits)
        self.note(stored_bits, packages, **more)

    @torch.inference_mode()
    def _difference(self, logits: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return how far the peer's own logits are from the dense folder's and the original's."""
        tokens = self.windows[:1, :64]
        theirs = logits(tokens).float()
        dense, original = (self.load_dense(f)(tokens).logits for f in (self.out, self.model))
        return {
            "rms_to_dense_export": float((theirs - dense).square().mean().sqrt()),
            "rms_to_original": float((theirs - original).square().mean().sqrt()),
            "same_top1": float((theirs.argmax(-1) == dense.argmax(-1)).float().mean()),
        }


def run(quantize: Callable[..., None]) -> None:
    """Do the job that the first argument is, as JSON; its settings become arguments."""
    given = json.loads(sys.argv[1])
    settings, job = given.pop("settings"), Job(**given)
    try:
        inspect.signature(quantize).bind(job, **settings)
    except TypeError as error:
        raise SystemExit(f"error: settings: {error}") from None
    quantize(job, **settings)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def gptq_weights(
    job: Job, folder: Path, num_bits: int, *, zero_offset: bool
) -> dict[str, torch.Tensor]:
    """Dequantize a checkpoint in GPTQ's layout: codes and zero points in words of 32 bits.

    Args:
        job: Whose layers they are.
        folder: With ``qweight [in * b / 32, out]``, ``qzeros [groups, out * b / 32]``,
            ``scales [groups, out]`` and, in some, ``g_idx [in]`` for every layer.
        num_bits: b, the width of a code; three words hold 32 codes of three bits.
        zero_offset: Whether zero points are stored less 1, as in the layout's first version.

    Returns:
        Weights ``[out, in]`` by layer, fp32.
    """
    tensors, weights = tensors_of(folder), {}
    for name, original in job.linears.items():
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


def awq_weights(job: Job, folder: Path) -> dict[str, torch.Tensor]:
    """Dequantize a checkpoint in AWQ's layout: eight outputs of four bits in a word.

    Args:
        job: Whose layers they are.
        folder: With ``qweight [in, out / 8]``, ``qzeros [groups, out / 8]`` and
            ``scales [groups, out]`` for every layer.

    Returns:
        Weights ``[out, in]`` by layer, fp32.
    """
    tensors, weights = tensors_of(folder), {}
    place = torch.tensor(AWQ_ORDER).argsort()
    for name in job.linears:
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


def check_levels(weights: Mapping[str, torch.Tensor], num_bits: int, group_size: int) -> None:
    """Refuse weights with more than ``2^num_bits`` distinct values in a group of a row."""
    for name, weight in weights.items():
        groups, _ = weight.reshape(-1, group_size).sort(dim=1)
        most = int((groups.diff(dim=1) != 0).sum(dim=1).max()) + 1
        if most > 2**num_bits:
            raise SystemExit(f"error: {name}: {most} values in a group of {num_bits} bits")
