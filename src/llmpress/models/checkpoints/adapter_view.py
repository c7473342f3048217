"""LoRA adapters of peft, read as the fine-tuned models they stand for.

Each adapted weight is ``W + scaling · B A`` with ``A [r, in]`` and ``B [out, r]``, computed in fp32
when it is read. ``scaling`` is ``alpha / r``, with ``use_rslora`` ``alpha / √r``; ``rank_pattern``
and ``alpha_pattern`` give single layers their own. With ``use_dora`` each row is then scaled to the
length that the adapter says. PiSSA and OLoRA took their first factors out of the base: ``W`` is
what they left of it. peft is not needed.
"""

from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmpress.core.artifacts import fingerprint
from llmpress.core.errors import ArtifactError, NumericalError, SourceError
from llmpress.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from llmpress.models.architectures import vocabulary_names
from llmpress.models.checkpoints.adapter_settings import REMEDY, AdapterSettings
from llmpress.models.checkpoints.conversion import names_in_model
from llmpress.models.checkpoints.dense_view import CheckpointView, dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint, fused_model

PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE, TOKENS = ".lora_magnitude_vector", ".trainable_tokens_delta"
WRAPPERS = (".base_layer.", ".token_adapter.", ".modules_to_save.")
"""Parts of stored names that are no part of the model's."""


class AdapterCheckpoint(CheckpointView):
    """A base model with a LoRA adapter merged into it; configuration and all else are the base's.

    Tensors that peft saves whole (``modules_to_save``, biases, grown embeddings) replace the
    base's. Where the base's head shares its embeddings and the adapter changes one of them, each
    has a tensor of its own afterwards.

    Args:
        base: What the adapter was trained on.
        folder: Holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ArtifactError: No adapter there, a damaged one, or one whose tensors do not fit the base.
        SourceError: An adapter of another kind than LoRA, or with a feature that is not known here.
    """

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        super().__init__(base, folder)
        self._settings = AdapterSettings(folder)
        self._file = _opened(folder)
        self._whole: dict[str, str] = {}  # by the model's name: the stored name
        self._factors: dict[str, dict[str, str]] = {}  # by weight: by suffix
        self._tokens: dict[str, str] = {}
        self._published = names_in_model(fused_model(self.config))
        for stored in self._file.keys():  # noqa: SIM118 - no dictionary
            self._place(stored)
        model = self.skeleton()
        self._embeddings, self._head = vocabulary_names(model)
        self._head_from: str | None = None
        self._grow()
        if self.config.tie_word_embeddings:
            self._untie()
        self._check_shapes(self.skeleton())

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        own = {self._head} if self._head_from else set()
        return sorted({*self.base.names(), *self._whole, *own})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if self._shares(name):
            return self.shape(self._embeddings)
        if name in self._whole:
            return self._stored_shape(self._whole[name])
        return self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; an adapted weight is fp32 ``[out, in]``.

        Raises:
            NumericalError: The adapter holds NaN or Inf there.
        """
        if self._shares(name):
            whole = self._head_from == "stored"
            return self._plain(self._embeddings) if whole else self.base.tensor(self._embeddings)
        tensor = self._plain(name)
        layer = name.removesuffix(".weight")
        if name in self._tokens:
            rows = self._read(self._tokens[name])
            index = self._settings.tokens(layer, is_embedding=name == self._embeddings)
            tensor = tensor.to(torch.promote_types(tensor.dtype, rows.dtype))
            return tensor.index_copy(0, torch.tensor(index), rows.to(tensor.dtype))
        if name not in self._factors:
            return tensor
        sides = {side: self._read(stored).float() for side, stored in self._factors[name].items()}
        scaling = self._settings.scaling(layer)
        weight: Tensor = tensor.float()
        first, second = EMBEDDING_FACTORS if EMBEDDING_FACTORS[0] in sides else FACTORS
        change: Tensor = scaling * (sides[second] @ sides[first])
        if first == EMBEDDING_FACTORS[0]:
            return weight + change.t()
        if self._settings.start and name not in self._whole:  # a copy lacks them already
            change = change - self._taken(weight, len(sides[first]), scaling)
        weight = weight + change
        if MAGNITUDE in sides:
            weight = weight * (sides[MAGNITUDE] / weight.norm(dim=1)).unsqueeze(1)
        return weight

    @property
    def fingerprint(self) -> str:
        """What identifies the adapter: of its provenance, or of its weights and configuration."""
        return fingerprint(self.folder, ADAPTER_CONFIG)

    def _taken(self, weight: Tensor, rank: int, scaling: float) -> Tensor:
        """Return what the adapter's first factors took out of a weight ``[out, in]``."""
        taken: Tensor
        if self._settings.start == "pissa":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            taken = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        else:
            Q, R = torch.linalg.qr(weight)
            taken = scaling * (Q[:, :rank] @ R[:rank])
        return taken

    def _place(self, stored: str) -> None:
        """Note which tensor of the model a stored one changes.

        What trainers write without peft's ``save_pretrained`` has the adapter's name in it, or what
        torch.compile adds.
        """
        name = stored.replace("_orig_mod.", "").removeprefix(PREFIX).replace(".default", "")
        if ".original_module." in name:
            return
        is_trained = ".modules_to_save." in name
        for part in WRAPPERS:
            name = name.replace(part, ".")
        for side in (*FACTORS, *EMBEDDING_FACTORS, MAGNITUDE, TOKENS):
            for suffix in (side, f"{side}.weight"):
                if name.endswith(suffix):
                    weight = f"{name.removesuffix(suffix)}.weight"
                    weight = self._published.get(weight, weight)
                    if side == TOKENS:
                        self._tokens[weight] = stored
                    else:
                        self._factors.setdefault(weight, {})[side] = stored
                    return
        name = self._published.get(name, name)
        if is_trained or name not in self._whole:
            self._whole[name] = stored

    def _grow(self) -> None:
        """Take over the size of a vocabulary that the adapter saved whole."""
        own = [n for n in (self._embeddings, self._head) if n in self._whole]
        sizes = {self._stored_shape(self._whole[name])[0] for name in own}
        old = self.base.shape(self._embeddings)[0]
        if sizes - {old}:
            shared = self.config.tie_word_embeddings
            if len(sizes) > 1 or (len(own) < 2 and not shared and self._head):
                self._refuse(self._whole[own[0]], f"has {max(sizes)} tokens, but not all others do")
            self.config.get_text_config().vocab_size = max(sizes)

    def _untie(self) -> None:
        """Give head and embeddings tensors of their own where the adapter changes only one.

        Tokens that are trained alone are those of both.
        """
        if self._settings.tokens(self._head.removesuffix(".weight"), is_embedding=False):
            raise SourceError(
                f"{self.folder}: has trainable_token_indices of a head that shares the embeddings, "
                f"which is not merged here; {REMEDY}"
            )
        if self._settings.start and self._head in self._factors:
            raise SourceError(
                f"{self.folder}: took its first values out of a head that shares the embeddings, "
                f"which changed those too; {REMEDY}"
            )
        self._tokens.pop(self._head, None)
        if self._head in self._whole:
            if self._head in self._factors or self._embeddings in self._factors:
                self.config.tie_word_embeddings = False
            elif self._embeddings in self._whole:
                pair = [self._plain(name) for name in (self._embeddings, self._head)]
                self.config.tie_word_embeddings = bool((pair[0] == pair[1]).all())
                if self.config.tie_word_embeddings:
                    del self._whole[self._head]
            else:
                self.config.tie_word_embeddings = False
        elif self._embeddings in self._factors:
            self._head_from = "stored"
        elif self._embeddings in self._whole and not self._settings.ties:
            self._head_from = "base"
        if self._head_from:
            self.config.tie_word_embeddings = False

    def _shares(self, name: str) -> bool:
        return self._head_from is not None and name == self._head

    def _plain(self, name: str) -> Tensor:
        """Return a tensor as the adapter found it: its own copy, or the base's."""
        whole = self._whole.get(name)
        return self.base.tensor(name) if whole is None else self._read(whole)

    def _check_shapes(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        modules, stored_names = dict(model.named_modules()), set(self.names())
        for name, sides in self._factors.items():
            layer, first = name.removesuffix(".weight"), next(iter(sides.values()))
            module = modules.get(layer)
            if not isinstance(module, nn.Linear | nn.Embedding) or name not in stored_names:
                self._refuse(first, "matches no linear layer of the base")
            with_it = self._settings.ties and name == self._head  # peft adapts the head too
            target = self._embeddings.removesuffix(".weight") if with_it else layer
            if not self._settings.targets(target):
                self._refuse(first, f"is of {layer}, which {ADAPTER_CONFIG} does not target")
            rank, (rows, columns) = self._settings.rank(layer), parameters[name].shape
            wanted: dict[str, tuple[int, ...]]
            if isinstance(module, nn.Linear):
                wanted = dict(zip(FACTORS, ((rank, columns), (rows, rank)), strict=True))
                wanted |= {MAGNITUDE: (rows,)} if self._settings.uses_dora else {}
            else:
                wanted = dict(zip(EMBEDDING_FACTORS, ((rank, rows), (columns, rank)), strict=True))
                if self._settings.uses_dora or not self._settings.starts_as_usual:
                    self._refuse(first, "adapts embeddings in a way that is not merged here")
            if sides.keys() != wanted.keys():
                self._refuse(first, f"comes with {sorted(sides)}, needed are {sorted(wanted)}")
            for side, shape in wanted.items():
                if (found := self._stored_shape(sides[side])) != shape:
                    self._refuse(
                        sides[side],
                        f"is {list(found)}; rank {rank} and the base's [{rows}, {columns}] need "
                        f"{list(shape)}",
                    )
        for name, stored in self._whole.items():
            if name not in parameters:
                self._refuse(stored, "matches no tensor of the base")
            shape, needed = self._stored_shape(stored), tuple(parameters[name].shape)
            if shape != needed:
                self._refuse(stored, f"is {list(shape)}, the base's is {list(needed)}")
        if self._settings.trains_tokens and not self._tokens:
            raise ArtifactError(
                f"{self.folder}: holds nothing of its trainable_token_indices; fetch it again"
            )
        for name, stored in self._tokens.items():
            layer = name.removesuffix(".weight")
            index = self._settings.tokens(layer, is_embedding=name == self._embeddings)
            if index is None or name not in parameters or name in self._factors:
                self._refuse(stored, f"is of {layer}, which has no trainable_token_indices")
            rows, columns = parameters[name].shape
            if not all(isinstance(row, int) and 0 <= row < rows for row in index):
                self._refuse(stored, f"is of tokens that the base's {rows} do not include")
            if self._stored_shape(stored) != (len(index), columns):
                self._refuse(stored, f"is not [{len(index)}, {columns}]")

    def _refuse(self, stored: str, why: str) -> NoReturn:
        raise ArtifactError(
            f"{self.folder}: {stored} {why}; name the adapter's own base, {self.base.folder} is not"
        )

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
