"""What an original predicts on some text, computed once for everything that is compared with it.

A reference folder holds token windows, the original's last hidden states on them, from which its
predictions follow exactly, and its own losses: D numbers a token instead of the V of a vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.artifacts import artifact_folder, claim, fingerprint, save_tensors, verify
from llmpress.core.devices import pick_device, pick_dtype
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.data.corpora import Text, measured_texts, named_texts, text_paths, token_windows
from llmpress.evaluation.likelihood import (
    Likelihood,
    last_states,
    likelihood,
    own_likelihood,
    predictions,
)
from llmpress.models.folders import model_folder
from llmpress.models.loading import dequantized, load_model, load_tokenizer
from llmpress.nn.layers.blocked import multiplying_in_blocks

FILE = "reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """An original and what it predicts.

    Attributes:
        model: The original, opened.
        windows: Token ids by text, int64 ``[W, T]``.
        states: Its last hidden states by text, ``[W, T - 1, D]``.
        likelihoods: Its own, by text.
        split: The part of corpora that they are of.
    """

    model: PreTrainedModel
    windows: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    likelihoods: Mapping[str, Likelihood]
    split: str

    @torch.inference_mode()
    def compare(self, model: PreTrainedModel) -> dict[str, Likelihood]:
        """Score another model on the same windows.

        Raises:
            ArtifactError: It has a vocabulary of another size.
            NumericalError: It computes NaN or Inf.
        """
        found = {}
        head = self.model.get_output_embeddings()
        with multiplying_in_blocks(model), multiplying_in_blocks(head):
            for name, tokens in self.windows.items():
                own = predictions(model, last_states(model, tokens, name))
                original = predictions(self.model, self.states[name])
                found[name] = likelihood(own, original, tokens, name)
        return found


@torch.inference_mode()
def refer(model: PreTrainedModel, windows: Mapping[str, Tensor], split: str = "test") -> Reference:
    """Run an original on token windows of a split.

    Raises:
        NumericalError: It computes NaN or Inf.
    """
    with multiplying_in_blocks(model):
        states = {name: last_states(model, tokens, name) for name, tokens in windows.items()}
        own = {
            name: likelihood(predictions(model, states[name]), None, tokens, name)
            for name, tokens in windows.items()
        }
    return Reference(model, windows, states, own, split)


def run_original(
    original: Path | str,
    *,
    text: Text,
    split: str = "test",
    windows: int = 8,
    length: int = 512,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> Reference:
    """Open an original and run it on text.

    Args:
        original: A model, compressed or not.
        text: What it reads. See `measured_texts`.
        split: The part of a corpus: ``test`` or ``validation``.
        windows: Token windows of each text.
        length: Tokens of a window.
        dtype: Precision of all models.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.

    Raises:
        ArtifactError: No model, or a damaged one.
        SourceError: A text is too short.
        NumericalError: The model computes NaN or Inf.
    """
    tokenizer = load_tokenizer(Path(original))
    cut = read_windows(measured_texts(text, tokenizer, split), tokenizer, length, windows)
    return refer(_opened(original, dtype, device), cut, split)


def make_reference(
    original: Path | str,
    *,
    text: str | Path | Sequence[str | Path],
    out: Path | str,
    split: str = "test",
    windows: int = 8,
    length: int = 512,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    force: bool = False,
) -> Path:
    """Run an original on text and keep what it predicts.

    Args:
        original: A model, compressed or not.
        text: What it reads. See `measured_texts`.
        out: Folder to write.
        split: The part of a corpus: ``test`` or ``validation``.
        windows: Token windows of each text.
        length: Tokens of a window.
        dtype: Precision of all models.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        force: Replace ``out`` where it exists.

    Returns:
        ``out``.

    Raises:
        ArtifactError: ``out`` exists; else as `run_original`.
    """
    out, original = Path(out), model_folder(original)
    settings: dict[str, Any] = {"split": split, "windows": windows}
    settings |= {"length": length, "dtype": dtype}
    places = {f"corpus {name}": place for name, place in named_texts(text).items()}
    corpora = {role: p for role, p in places.items() if isinstance(p, Path) and p.is_dir()}
    inputs = {"original": original, **corpora}
    with (
        claim(out, force=force, inputs=(original, *text_paths(text))) as target,
        artifact_folder(target, stage="reference", settings=settings, inputs=inputs) as folder,
    ):
        made = run_original(original, text=text, device=device, **settings)
        settings["texts"] = list(made.windows)
        tensors = {f"windows.{name}": tokens.int() for name, tokens in made.windows.items()}
        tensors |= {f"states.{name}": states for name, states in made.states.items()}
        tensors |= {f"losses.{name}": own.losses for name, own in made.likelihoods.items()}
        save_tensors(tensors, folder / FILE)
    return out


def read_reference(
    folder: Path | str,
    original: Path,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> Reference:
    """Open a reference and the original that it is of.

    Raises:
        ArtifactError: Missing, damaged, of another model or in another precision.
    """
    folder = Path(folder)
    made = verify(folder)
    for what, kept, now in (
        ("model", made["inputs"].get("original"), fingerprint(original)),
        ("dtype", made["settings"].get("dtype"), dtype),
    ):
        if kept != now:
            raise ArtifactError(
                f"{folder}: is of another {what} than is asked for now; make the reference again"
            )
    tensors, names = load_file(folder / FILE), made["settings"]["texts"]
    windows, states, losses = (
        {name: tensors[f"{part}.{name}"] for name in names}
        for part in ("windows", "states", "losses")
    )
    windows = {name: tokens.long() for name, tokens in windows.items()}
    own = {name: own_likelihood(losses[name], windows[name].shape[1] - 1) for name in names}
    opened = _opened(original, dtype, device)
    return Reference(opened, windows, states, own, made["settings"]["split"])


def read_windows(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
) -> dict[str, Tensor]:
    """Return token windows ``[count, length]`` of each text.

    Raises:
        SourceError: One is too short; names it.
    """
    windows = {}
    for name, documents in texts.items():
        try:
            windows[name] = token_windows(documents, tokenizer, length, count)
        except SourceError as error:
            raise SourceError(f"text {name}: {error}") from None
    return windows


def _opened(original: Path | str, dtype: str, device: str | torch.device | None) -> PreTrainedModel:
    return dequantized(
        load_model(original, dtype=pick_dtype(dtype), device=str(pick_device(device)))
    )
