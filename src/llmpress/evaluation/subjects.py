"""What a name in params.yaml stands for, and how it is opened for evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KINDS, KindName
from llmpress.core.params import section, suggestion
from llmpress.deltas.applying import load_finetuned
from llmpress.evaluation.sizes import origin
from llmpress.models.adapters import is_adapter, load_adapted, merged
from llmpress.models.checkpoints.adapter_settings import AdapterSettings
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.folders import model_folder
from llmpress.models.generation import plain_generation
from llmpress.models.loading import dequantized, load_model, load_tokenizer

MODELS = Path("data/models")
"""Where ``fetch_model`` and ``train_task`` put models."""


@dataclass(frozen=True)
class Subject:
    """A model, run, delta run, finetune, training or peer.

    Attributes:
        name: In params.yaml.
        kind: Which of `llmpress.core.kinds`.
        folder: The artifact that is evaluated.
        original_folder: Where the model lies that it is compared with, itself for a model.
        base_folder: Of a delta: where the model lies that it is put on.
    """

    name: str
    kind: KindName
    folder: Path
    original_folder: Path
    base_folder: Path | None = None

    @property
    def original(self) -> str:
        """Name of the model it is compared with."""
        return self.original_folder.name

    @property
    def base(self) -> str | None:
        """Name of the model that a delta is put on."""
        return None if self.base_folder is None else self.base_folder.name

    def load(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """Load as it is stored: compressed layers and deltas stay packed.

        What is generated is the most probable text, whatever generation_config.json asks for.

        Raises:
            ArtifactError: The artifact is missing or damaged.
            SourceError: An adapter of a kind that is not known here.
        """
        model = self._load(dtype, device)
        plain_generation(model)
        return model

    def _load(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        if is_adapter(self.folder):
            AdapterSettings(self.folder)  # peft opens some that are not the model they were
            return load_adapted(self.folder, self.original_folder, dtype=dtype, device=device)
        if self.base_folder is None:
            return load_model(self.folder, dtype=dtype, device=device)
        return load_finetuned(self.base_folder, self.folder, dtype=dtype, device=device)

    def load_dense(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """Load with dense weights of the values that are stored."""
        model = self.load(dtype, device)
        return merged(model, dtype) if is_adapter(self.folder) else dequantized(model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; a delta's is that of the fine-tuned model."""
        return load_tokenizer(self.folder if self.base_folder is None else self.original_folder)


def folder_subject(
    folder: Path | str, original: Path | str | None = None, base: Path | str | None = None
) -> Subject:
    """Find out what lies in a folder.

    Args:
        folder: A model, compressed or not, an adapter, or a compressed delta.
        original: What it is compared with; a model by default with itself.
        base: The model that a delta is put on.

    Raises:
        ArtifactError: Nothing of the kind, or something else in the place of a model.
        ConfigError: What is no plain model comes without an original, or a delta without a base.
    """
    folder = Path(folder)
    kind: KindName = "model"
    if (folder / HEADER).is_file():
        kind = "delta"
        if base is None:
            raise ConfigError(f"{folder}: is a delta: name the `base` that it is put on too")
    elif is_adapter(folder):
        kind = "trained"
    else:
        kind = "compressed" if layer_records(model_folder(folder)) else "model"
    stage = origin(folder).get("stage")
    if stage in ("finetune", "train"):
        kind = "finetuned" if stage == "finetune" else "trained"
    elif stage == "peer":
        kind = "peer"
    if original is None and kind != "model":
        raise ConfigError(f"{folder}: name the `original` that it is compared with too")
    return Subject(
        folder.name,
        kind,
        folder,
        model_folder(folder if original is None else original),
        None if base is None or kind not in ("delta", "trained") else model_folder(base),
    )


def find_subject(params: Mapping[str, Any], name: str) -> Subject:
    """Find out what ``name`` is.

    Args:
        params: Content of params.yaml.
        name: Of one of ``evaluation.models``, ``runs``, ``delta_runs``, ``finetunes``,
            ``trainings`` or ``peers``.

    Raises:
        ConfigError: It is none of them, or several.
    """
    section(params, "evaluation.models")
    groups = {kind: kind.entries(params) for kind in KINDS}
    found = [kind for kind, entries in groups.items() if name in entries]
    if not found:
        known = [key for entries in groups.values() for key in entries]
        raise ConfigError(f"{name!r} is no model or run to evaluate{suggestion(name, known)}")
    if len(found) > 1:
        sections = " and ".join(kind.section for kind in found)
        raise ConfigError(f"{name!r} stands in {sections}: rename one of them")
    (kind,) = found
    folder = Path("data") / kind.folder / name
    if kind.original is None:
        return Subject(name, kind.name, folder, folder)
    original = MODELS / section(params, f"{kind.section}.{name}.{kind.original}")
    run = name if kind.name == "delta" else None
    if kind.name == "trained" and groups[kind][name].get("trains") == "delta":
        run = section(params, f"{kind.section}.{name}.start").removeprefix("compressed/")
    return Subject(name, kind.name, folder, original, _base_folder(params, run) if run else None)


def _base_folder(params: Mapping[str, Any], delta_run: str) -> Path:
    return Path("data") / str(section(params, f"delta_runs.{delta_run}.base"))
