"""What adapter_config.json of peft says, and which of it changes what a LoRA adapter computes."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmpress.core.artifacts import read_json
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.models.adapters import ADAPTER_CONFIG

KNOWN = frozenset(
    (
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path"),
        *("revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora"),
        *("use_dora", "fan_in_fan_out", "target_modules", "exclude_modules", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
        *("alpha_pattern", "trainable_token_indices", "ensure_weight_tying", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    )
)
"""Settings that are computed here, or that change nothing once an adapter is trained.

``fan_in_fan_out`` is one of these: peft takes it back for every nn.Linear."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""First values of adapters that leave the base as it is."""
REMEDY = (
    "merge it with peft's merge_and_unload, if it can be, and extract the delta of the merged model"
)


class AdapterSettings:
    """The settings of a LoRA adapter, checked.

    Args:
        folder: Of the adapter.

    Attributes:
        start: ``pissa`` or ``olora`` where the adapter's first values were taken from the base,
            which then lacks them; None otherwise.
        starts_as_usual: Whether they were zeros and random numbers.
        uses_dora: Whether each output has a magnitude of its own.
        ties: Whether head and embeddings of a tied model are adapted as one.
        trains_tokens: Whether single rows of a layer are trained.

    Raises:
        ArtifactError: Damaged settings.
        SourceError: An adapter of another kind than LoRA, or one that computes something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = read_json(folder / ADAPTER_CONFIG)
        if not isinstance(settings, dict):
            raise ArtifactError(f"{folder / ADAPTER_CONFIG}: damaged; fetch the adapter again")
        kind = settings.get("peft_type")
        if kind != "LORA":
            raise SourceError(
                f"{folder}: is a peft adapter of type {kind}; only LORA is merged here; {REMEDY}"
            )
        for key, value in settings.items():
            if value and key not in KNOWN:
                raise SourceError(
                    f"{folder}: is an adapter with {key}, which is not merged here; {REMEDY}"
                )
        start = settings.get("init_lora_weights")
        start = start.lower() if isinstance(start, str) else start
        if start not in (*PLAIN_STARTS, "pissa", "olora"):
            raise SourceError(
                f"{folder}: is an adapter with init_lora_weights={start!r}, which took its first "
                "values out of the base in a way that the adapter does not tell; save it with "
                "peft's path_initial_model_for_weight_conversion"
            )
        self._settings = settings
        self.start = start if start in ("pissa", "olora") else None
        self.starts_as_usual = start in (True, False, None, "gaussian")
        self.uses_dora = bool(settings.get("use_dora"))
        self.ties = bool(settings.get("ensure_weight_tying"))
        self.trains_tokens = bool(settings.get("trainable_token_indices"))
        self._check()

    def rank(self, layer: str) -> int:
        """Return the rank of a layer's factors."""
        return int(self._of_layer("rank_pattern", layer, self._settings["r"]))

    def scaling(self, layer: str) -> float:
        """Return what a layer's product of factors is multiplied by."""
        alpha = float(self._of_layer("alpha_pattern", layer, self._settings["lora_alpha"]))
        rank = self.rank(layer)
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def targets(self, layer: str) -> bool:
        """Whether peft puts factors on a layer."""
        wanted = self._settings.get("target_modules")
        if isinstance(wanted, str) and wanted != "all-linear":
            if not self._matches(wanted, layer):
                return False
        elif isinstance(wanted, list) and not _ends_with(layer, wanted):
            return False
        blocks = self._settings.get("layers_to_transform")
        if blocks is None or blocks == []:
            return True
        own = [int(part) for part in layer.split(".") if part.isdigit()]
        return bool(own) and own[0] in (blocks if isinstance(blocks, list) else [blocks])

    def tokens(self, layer: str, *, is_embedding: bool) -> list[int] | None:
        """Return the rows of a layer that are trained alone, None for a layer without any."""
        wanted = self._settings.get("trainable_token_indices") or []
        if isinstance(wanted, dict):
            return next((rows for key, rows in wanted.items() if _ends_with(layer, [key])), None)
        return list(wanted) if is_embedding and wanted else None

    def _of_layer(self, pattern: str, layer: str, default: Any) -> Any:
        """Return a layer's own setting: the first pattern that its name ends with, as in peft."""
        for key, value in (self._settings.get(pattern) or {}).items():
            if self._matches(rf"(.*\.)?({key})", layer):
                return value
        return default

    def _matches(self, pattern: str, layer: str) -> bool:
        try:
            return re.fullmatch(pattern, layer) is not None
        except re.error as error:
            raise self._damaged(f"{pattern!r} is no pattern ({error})") from None

    def _check(self) -> None:
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            if key not in self._settings:
                raise self._damaged(f"lacks {key}")
            own = self._settings.get(pattern) or {}
            if not isinstance(own, Mapping):
                raise self._damaged(f"{pattern} is {own!r}, no mapping")
            for value in (self._settings[key], *own.values()):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or (key == "r" and (value < 1 or value != int(value))):
                    raise self._damaged(f"{key} is {value!r}, no number that it may be")

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.folder / ADAPTER_CONFIG}: {what}; fetch the adapter again")


def _ends_with(layer: str, names: list[str]) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for name in names)
