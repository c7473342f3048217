"""LoRA adapters of peft, read as the fine-tuned models they stand for.

Each adapted weight is ``W + scaling · B A`` with ``A [r, in]`` and ``B [out, r]``, computed in fp32
when it is read. ``scaling`` is ``alpha / r``, with ``use_rslora`` ``alpha / √r``; ``rank_pattern``
and ``alpha_pattern`` give single layers their own. peft is not needed.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmpress.core.artifacts import fingerprint, read_json
from llmpress.core.errors import ArtifactError, NumericalError, SourceError
from llmpress.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from llmpress.models.checkpoints.conversion import names_in_model
from llmpress.models.checkpoints.dense_view import CheckpointView, dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint, fused_model

PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
REFUSED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
)
"""Settings of peft that change what an adapter computes into something else than the above."""


class AdapterCheckpoint(CheckpointView):
    """A base model with a LoRA adapter merged into it; configuration and all else are the base's.

    Tensors that peft saves whole (``modules_to_save``, biases) replace the base's.

    Args:
        base: What the adapter was trained on.
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ArtifactError: No adapter there, a damaged one, or one whose tensors do not fit the base.
        SourceError: An adapter of another kind than LoRA, or with a feature that is not known here.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        super().__init__(base, folder)
        self._settings = read_json(folder / ADAPTER_CONFIG)
        _check_features(folder, self._settings)
        self._file = _opened(folder)
        model = self.skeleton()
        tied = bool(self.config.tie_word_embeddings)
        self._head = _name_of(model, model.get_output_embeddings())
        self._factors: dict[str, dict[str, str]] = {}  # by weight: its side and the stored name
        self._whole: dict[str, str] = {}
        self._published = names_in_model(fused_model(self.config))
        for stored in self._file.keys():  # noqa: SIM118 - no dictionary
            self._place(stored)
        self._check_shapes(model)
        if tied and self._whole.keys() & {self._head}:
            self.config.tie_word_embeddings = False
        elif tied and _name_of(model, model.get_input_embeddings()) in self._whole:
            raise SourceError(
                f"{folder}: saves the embeddings of a model whose head shares them, but no head; "
                "merge it with peft's merge_and_unload and extract the delta of the merged model"
            )

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted({*self.base.names(), *self._whole})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name in self._whole:
            return self._stored_shape(self._whole[name])
        return self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; an adapted weight is fp32 ``[out, in]``.

        Raises:
            NumericalError: The adapter holds NaN or Inf there.
        """
        whole = self._whole.get(name)
        tensor = self._read(whole) if whole is not None else self.base.tensor(name)
        if name not in self._factors:
            return tensor
        A, B = (self._read(self._factors[name][side]).float() for side in FACTORS)
        scaling = self._scaling(name.removesuffix(".weight"), A.shape[0])
        return tensor.float() + scaling * (B @ A)

    @property
    def fingerprint(self) -> str:
        """What identifies the adapter: of its provenance, or of its weights and configuration."""
        return fingerprint(self.folder, ADAPTER_CONFIG)

    def _place(self, stored: str) -> None:
        """Note which tensor of the model a stored one changes."""
        name = stored.removeprefix(PREFIX).replace(".base_layer.", ".")
        for side in FACTORS:
            if name.endswith(side):
                weight = f"{name.removesuffix(side)}.weight"
                weight = self._published.get(weight, weight)
                self._factors.setdefault(weight, {})[side] = stored
                return
        self._whole[self._published.get(name, name)] = stored

    def _check_shapes(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        modules, stored_names = dict(model.named_modules()), set(self.names())
        for name, sides in self._factors.items():
            layer = name.removesuffix(".weight")
            if not isinstance(modules.get(layer), nn.Linear) or name not in stored_names:
                self._refuse(next(iter(sides.values())), "matches no linear layer of the base")
            if len(sides) < len(FACTORS):
                self._refuse(next(iter(sides.values())), "lacks the other factor")
            rank = int(self._of_layer("rank_pattern", layer, self._settings["r"]))
            rows, columns = parameters[name].shape
            found = [self._stored_shape(sides[side]) for side in FACTORS]
            if found != [(rank, columns), (rows, rank)]:
                self._refuse(
                    sides[FACTORS[0]],
                    f"and its other factor are {list(found[0])} and {list(found[1])}, which does "
                    f"not fit rank {rank} and the base's [{rows}, {columns}]",
                )
        for name, stored in self._whole.items():
            if name not in parameters:
                self._refuse(stored, "matches no tensor of the base")
            shape, needed = self._stored_shape(stored), tuple(parameters[name].shape)
            if shape != needed:
                self._refuse(stored, f"is {list(shape)}, the base's is {list(needed)}")

    def _refuse(self, stored: str, why: str) -> None:
        raise ArtifactError(
            f"{self.folder}: {stored} {why}; name the adapter's own base, {self.base.folder} is not"
        )

    def _scaling(self, layer: str, rank: int) -> float:
        alpha = float(self._of_layer("alpha_pattern", layer, self._settings["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _of_layer(self, pattern: str, layer: str, default: Any) -> Any:
        """Return a layer's own setting: the first pattern that its name ends with, as in peft."""
        for key, value in (self._settings.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", layer):
                return value
        return default

    def _stored_shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(stored).get_shape())

    def _read(self, stored: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(stored)
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{self.folder}: {stored} holds NaN or Inf; fetch it again")
        return tensor


def finetuned_checkpoint(base: Checkpoint, folder: Path) -> Checkpoint:
    """Open what became of a base: a model folder, or a LoRA adapter as the merged model.

    Raises:
        ArtifactError: Neither there, or a damaged one, or an adapter of another base.
        SourceError: An adapter that cannot be merged, or a model transformers cannot read.
    """
    return AdapterCheckpoint(base, folder) if is_adapter(folder) else dense_checkpoint(folder)


def _check_features(folder: Path, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ArtifactError(f"{folder / ADAPTER_CONFIG}: damaged; fetch the adapter again")
    if settings.get("peft_type") != "LORA":
        raise SourceError(
            f"{folder}: is a peft adapter of type {settings.get('peft_type')}; only LORA is merged"
        )
    for key in REFUSED:
        if settings.get(key):
            raise SourceError(
                f"{folder}: is an adapter with {key}, which is not merged here; merge it with "
                "peft's merge_and_unload and extract the delta of the merged model"
            )
    if missing := [key for key in ("r", "lora_alpha") if key not in settings]:
        raise ArtifactError(f"{folder / ADAPTER_CONFIG}: lacks {missing[0]}; fetch it again")


def _opened(folder: Path) -> Any:
    path = folder / ADAPTER_WEIGHTS
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: is missing; save the adapter as safetensors, pickle is not opened"
        ) from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: damaged ({error}); fetch the adapter again") from None


def _name_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the name of a module's weight."""
    return f"{next((n for n, m in model.named_modules() if m is module), '')}.weight"
