"""Hugging Face checkpoint folders, read tensor by tensor and never loaded whole."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmpress.core.artifacts import WEIGHTS_INDEX, fingerprint, read_json, write_json
from llmpress.core.companions import COMPANIONS
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.core.shards import ShardWriter
from llmpress.models.architectures import block_linears
from llmpress.models.checkpoints.conversion import (
    Converted,
    guard_name,
    model_tensors,
    stored_tensors,
)
from llmpress.models.checkpoints.lazy import Index, LazyTensor
from llmpress.models.checkpoints.quantized_source import check_codes, quantization_of, weights_of
from llmpress.models.experts import separate_experts
from llmpress.models.quantizer import is_guard, own_quantization

__all__ = ["Checkpoint", "CheckpointWriter", "block_linears", "copy_companions", "linear_bits"]

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MODEL_SHARD_BYTES = 2 << 30
UNBUILDABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers raises where a configuration contradicts itself."""
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls dtypes, in the order of its files; of others bytes are told."""


class Checkpoint:
    """A folder with config.json and safetensors weights, in one file or in shards.

    A tensor is read when it is asked for and has a file mapping of its own, so that its pages are
    let go with it: a walk over all tensors never holds more than those in use. Tensors go by the
    names they have in the model, which for some architectures are not those in the file. Of a
    model that somebody else quantized the weights are read, never their codes: in fp32 those of
    the decoder blocks' linears, all others in the model's dtype, as transformers dequantizes them.

    Attributes:
        folder: Where it lies.
        config: The model's configuration.
        quantization: How somebody else quantized it, nothing of other models.

    Raises:
        ArtifactError: No checkpoint in this folder, or a shard missing or truncated.
        SourceError: Only pickle weights, which are never opened, or codes that are not dequantized.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        self._stored: dict[str, LazyTensor] = {}
        dtypes: dict[str, str] = {}
        for path in self._files():
            with self._open(path) as shard:
                for name in shard.keys():  # noqa: SIM118 - no dictionary
                    self._stored[name] = self._lazy(path, name, shard.get_slice(name))
                    dtypes[name] = shard.get_slice(name).get_dtype()
        self.quantization = quantization_of(self.config, self.folder)
        if own_quantization(self.config) is None:
            check_codes(self.folder, dtypes, self.quantization.get("quant_method"))
        if self.quantization:
            del self.config.quantization_config
            own = self.config.dtype if isinstance(self.config.dtype, torch.dtype) else torch.float32
            self._stored = weights_of(self.folder, self._stored, self.quantization, own)

    def _files(self) -> list[Path]:
        """Return the files that transformers reads: one, whatever else is there, or shards."""
        stated = getattr(self.config, "transformers_weights", None)
        name = stated or (WEIGHTS if (self.folder / WEIGHTS).is_file() else WEIGHTS_INDEX)
        names = [name]
        if name.endswith(INDEX_SUFFIX) and (self.folder / name).is_file():
            index = read_json(self.folder / name)
            where = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(where, dict) or not all(isinstance(n, str) for n in where.values()):
                raise ArtifactError(f"{self.folder / name}: damaged; fetch the model again")
            names = sorted(set(where.values()))
        elif not (self.folder / name).is_file():
            names = [p.name for pattern in ("*.bin", "*.pt") for p in self.folder.glob(pattern)]
            if not names:
                missing = stated or WEIGHTS
                raise ArtifactError(f"{self.folder}: no weights here ({missing} is missing)")
        if pickled := sorted(name for name in names if not name.endswith(".safetensors")):
            raise SourceError(
                f"{self.folder}: {pickled[0]} holds weights as pickle, which is not opened; "
                "save the model with safe_serialization=True first"
            )
        return [self.folder / name for name in names]

    def _lazy(self, path: Path, name: str, stored: Any) -> LazyTensor:
        shape = stored.get_shape()

        def read(index: Index) -> Tensor:
            whole = all(part == slice(0, size) for part, size in zip(index, shape, strict=True))
            with self._open(path) as shard:
                found: Tensor = shard.get_tensor(name) if whole else shard.get_slice(name)[index]
            return found

        return LazyTensor(shape, DTYPES.get(stored.get_dtype(), torch.uint8), read)

    @cached_property
    def _converted(self) -> Converted:
        found = self._found()
        if self.config.tie_word_embeddings:
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
            _forget_copies(found.tensors, model_class._tied_weights_keys or {})
        return found

    def _found(self) -> Converted:
        if own_quantization(self.config) is not None:  # under the model's names
            return Converted({n: t for n, t in self._stored.items() if not is_guard(t.shape)}, [])
        try:
            converted = model_tensors(fused_model(self.config), self._stored)
        except UNBUILDABLE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ArtifactError(f"{self.folder}: {reason}; fetch the model again") from None
        if converted.ignored:
            _say_ignored(self.folder, len(converted.ignored), converted.ignored[0])
        return converted

    @property
    def ignored(self) -> list[str]:
        """Names in the files that the model has no place for, sorted; transformers skips them."""
        return self._converted.ignored

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise ArtifactError(f"{path}: shard is missing; fetch the model again") from None
        except SafetensorError as error:
            raise ArtifactError(f"{path}: damaged ({error}); fetch the model again") from None

    def plain_config(self) -> dict[str, Any]:
        """Return the configuration as config.json holds it, infinite numbers as transformers does.

        A compressed model's holds the list of its layers, too.
        """
        valid = json.loads(self.config.to_json_string(use_diff=True))  # JSON, but sorted
        config = {key: valid[key] for key in self.config.to_diff_dict()}
        return config | {"architectures": self.config.architectures}

    @property
    def fingerprint(self) -> str:
        """What identifies the model: see `llmpress.core.artifacts.fingerprint`."""
        return fingerprint(self.folder)

    def names(self) -> list[str]:
        """Return the names of all stored tensors, sorted."""
        return sorted(self._converted.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor = self._tensor(name).read()
        stays = not self.quantization or name in self._block_weights
        return tensor if stays else tensor.to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return what a tensor is stored in, or dequantized to by transformers."""
        return self._tensor(name).dtype

    def read(self) -> dict[str, Tensor]:
        """Read all tensors, of a model that somebody else quantized all that were in fp32."""
        return {name: self._tensor(name).read() for name in self.names()}

    @cached_property
    def _block_weights(self) -> set[str]:
        return {f"{n}.weight" for block in block_linears(self.skeleton()) for n in block}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Read all tensors whose name starts with ``prefix``, which is cut off."""
        return {
            n.removeprefix(prefix): self.tensor(n) for n in self.names() if n.startswith(prefix)
        }

    def _tensor(self, name: str) -> LazyTensor:
        if name not in self._converted.tensors:
            raise ArtifactError(f"{self.folder}: holds no tensor {name!r}")
        return self._converted.tensors[name]

    def skeleton(self) -> PreTrainedModel:
        """Build the model with parameters on the meta device and buffers in memory."""
        return empty_model(self.config, self.folder)

    def guard(self, layers: Iterable[str]) -> str | None:
        """Return the `guard_name` of this model with these layers compressed."""
        return guard_name(fused_model(self.config), layers)

    def published(self, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
        """Return what transformers would save of the model, unread, by the names in its files.

        Args:
            dtype: Of the weights of linears in decoder blocks; None for their own, as of the rest.
        """

        def read(name: str, index: Index) -> Tensor:
            tensor = self.tensor(name)[index]
            return tensor.to(dtype) if dtype and name in self._block_weights else tensor

        own = {n: LazyTensor(self.shape(n), torch.float32, partial(read, n)) for n in self.names()}
        return stored_tensors(fused_model(self.config), own)


@cache
def _say_ignored(folder: Path, count: int, first: str) -> None:
    logger.warning(
        "%s: %d tensors have no place in the model and are left out, as by transformers: %s%s",
        folder,
        count,
        first,
        ", ..." if count > 1 else "",
    )


def empty_model(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Build a model of a folder's configuration, as `Checkpoint.skeleton` does.

    Raises:
        SourceError: A mixture of experts of another form than those llmpress takes apart, or a
            configuration that transformers makes no model of.
    """
    try:
        model = fused_model(config)
        separate_experts(model)
    except UNBUILDABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"{folder}: transformers makes no model of its config.json ({reason[:200]}); "
            "fetch the model again"
        ) from None
    model.eval()
    return model


def fused_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the same with experts as transformers has them, fused."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def refuse_quantized(folder: Path) -> None:
    """Refuse a model that somebody else quantized, where transformers would open it by itself.

    Raises:
        SourceError: It is one.
    """
    if found := Checkpoint(folder).quantization.get("quant_method"):
        raise SourceError(
            f"{folder}: is quantized ({found}), which is not trained; write it dense first, with "
            "`llmpress export --dense`"
        )


def linear_bits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return how many weights the decoder blocks' linears have, and the bits they are read in."""
    tensors = [checkpoint._tensor(name) for name in sorted(checkpoint._block_weights)]
    return (
        sum(tensor.numel() for tensor in tensors),
        sum(8 * tensor.dtype.itemsize * tensor.numel() for tensor in tensors),
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the checkpoint's largest tensor."""
    largest = max(checkpoint.names(), key=lambda n: torch.Size(checkpoint.shape(n)).numel())
    return checkpoint.tensor(largest).dtype


def _forget_copies(tensors: dict[str, LazyTensor], ties: Mapping[str, str]) -> None:
    """Leave out a tied head that is stored beside the embeddings it shares, in place.

    transformers ties what is equal, and keeps a head of its own where the two differ.
    """
    for head, embeddings in dict(ties).items():
        if head in tensors and embeddings in tensors:
            one, other = tensors[head], tensors[embeddings]
            if one.shape == other.shape and bool((one.read() == other.read()).all()):
                del tensors[head]


def read_config(folder: Path) -> PretrainedConfig:
    """Read a model's configuration.

    Raises:
        ArtifactError: It is missing or damaged.
        SourceError: transformers does not know it, or it is of no causal language model.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no model here (config.json is missing)")
    read_json(folder / "config.json")  # a damaged file is named before transformers reads it
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(
            f"{folder}: transformers cannot read its config.json, and code that comes with a model "
            f"is never run ({reason})"
        ) from None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = {n for v in known.values() for n in ((v,) if isinstance(v, str) else v)}
    stated = config.architectures or [known.get(config.model_type, config.model_type)]
    if config.model_type not in known or not classes.intersection(stated):
        raise SourceError(
            f"{folder}: {stated[0]} is no causal language model; llmpress compresses decoders that "
            "predict the next token"
        )
    return config


class CheckpointWriter:
    """Writes named tensors into safetensors shards of bounded size, then an index where needed.

    Args:
        folder: Where to write.
        max_shard_bytes: A shard is closed before it would exceed this.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = MODEL_SHARD_BYTES) -> None:
        self.folder = folder
        self._shards = ShardWriter(folder, "model", max_shard_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor; it is written when its shard is full."""
        self._shards.add(name, tensor)

    def close(self, guard: str | None = None) -> None:
        """Write what is left, name the shards, and write the index if there are several.

        Args:
            guard: What `guard_name` says of a model that only llmpress is to open.
        """
        if guard:
            self.add(guard, torch.empty(0, dtype=torch.uint8))
        files = self._shards.close()
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            metadata = {"total_size": self._shards.total_bytes}
            index = {"metadata": metadata, "weight_map": weight_map}
            write_json(self.folder / WEIGHTS_INDEX, index)


def companions(folder: Path) -> list[Path]:
    """Return what lies beside a model's weights: tokenizer, processor, templates, licence."""
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(found)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the `companions` of one model folder to another, without naming code left behind."""
    for file in companions(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
        if file.name.endswith("_config.json") and '"auto_map"' in file.read_text(encoding="utf-8"):
            write_json(copy, {k: v for k, v in read_json(file).items() if k != "auto_map"})
