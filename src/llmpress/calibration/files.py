"""What calibration text tells of a model: the second moment of every linear layer's input."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llmpress.calibration.linear_calls import linear_calls
from llmpress.calibration.moments import InputMoments
from llmpress.calibration.sensitivity import output_sensitivity
from llmpress.core.artifacts import read_json, read_provenance, save_tensors, write_json
from llmpress.core.errors import ArtifactError
from llmpress.core.progress import progress
from llmpress.methods.base import InputStatistics
from llmpress.models.experts import expert_matrix
from llmpress.models.walk import BlockWalk

WINDOWS = "windows.safetensors"
INDEX = "index.json"
SENSITIVITY = "sensitivity.safetensors"
FEW_TOKENS = 100
"""An expert that saw fewer than this is worth a warning."""

logger = logging.getLogger(__name__)


class Statistics(Mapping[str, InputStatistics]):
    """Input statistics of every calibrated layer by full name, read from disk when asked for.

    Args:
        folder: A calibration artifact.

    Raises:
        ArtifactError: The folder is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / INDEX)
        self._where: dict[str, tuple[str, str]] = {k: tuple(v) for k, v in index["layers"].items()}
        self._num_tokens: int = index["num_tokens"]
        self._tokens: dict[str, int] = index.get("tokens", {})
        self._felt: frozenset[str] = frozenset(index.get("sensitivity", ()))

    def __getitem__(self, name: str) -> InputStatistics:
        """Read the statistics of one layer."""
        file, key = self._where[name]
        felt = None
        try:
            with safe_open(self.folder / file, framework="pt") as moments:
                moment = moments.get_tensor(key)
            if name in self._felt:
                file = SENSITIVITY
                with safe_open(self.folder / file, framework="pt") as sensitivity:
                    felt = sensitivity.get_tensor(name)
        except (FileNotFoundError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.folder / file}: damaged ({error}); calibrate again"
            ) from None
        return InputStatistics(moment, self._tokens.get(name, self._num_tokens), felt)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all layers."""
        return iter(self._where)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._where)


def check_calibration(folder: Path, fingerprint: str, name: str) -> None:
    """Refuse statistics of another model than the one they are to be used for.

    Args:
        folder: A calibration artifact.
        fingerprint: Of the model.
        name: Of the model, for the message.

    Raises:
        ArtifactError: It was made on another model, or is no calibration.
    """
    inputs = read_provenance(folder).get("inputs") or {}
    if not (folder / INDEX).is_file() or "model" not in inputs:
        raise ArtifactError(f"{folder}: is no calibration; make one with `llmpress calibrate`")
    if inputs["model"] != fingerprint:
        raise ArtifactError(
            f"{folder}: was made on another model ({inputs['model'][:12]}) than {name} "
            f"({fingerprint[:12]}); calibrate {name}"
        )


def load_statistics(folder: Path) -> Statistics:
    """Open the statistics of a calibration artifact."""
    return Statistics(folder)


def load_windows(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the token windows for calibration and for validation, int64 ``[windows, tokens]``."""
    try:
        tensors = load_file(folder / WINDOWS)
    except (FileNotFoundError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WINDOWS}: damaged ({error}); calibrate again") from None
    return tensors["calibration"], tensors["validation"]


def save_calibration(
    walk: BlockWalk,
    windows: Tensor,
    validation: Tensor,
    folder: Path,
    sensitivity_windows: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Run a model over its calibration windows and store what its linears' inputs look like.

    Args:
        walk: The model.
        windows: Token ids the statistics are taken over, ``[windows, tokens]``.
        validation: Token ids kept aside for finetuning, ``[windows, tokens]``.
        folder: Where windows, one file of moments per block, and an index are written.
        sensitivity_windows: Token ids to measure the outputs' sensitivity on, stored too; None or
            none of them leaves that out.
        seed: Of the labels drawn for it.
    """
    save_tensors({"calibration": windows, "validation": validation}, folder / WINDOWS)
    hidden_states = walk.embed(windows)
    where: dict[str, tuple[str, str]] = {}
    tokens: dict[str, int] = {}
    for index in progress(range(len(walk)), "calibrate blocks"):
        block = walk.load(index)
        file = f"moments-{index:03d}.safetensors"
        inputs = InputMoments(block)
        with linear_calls(block, inputs.add):
            hidden_states = walk.propagate(block, index, hidden_states, in_place=True)
        moments = inputs.moments()
        save_tensors(moments, folder / file)
        for name, leader in inputs.leaders.items():
            full_name = f"{walk.prefix}.{index}.{name}"
            where[full_name] = (file, leader)
            if expert_matrix(full_name):
                tokens[full_name] = inputs.tokens.get(leader, 0)
        del block, inputs, moments  # before the next block is there
    felt: dict[str, Tensor] = {}
    if sensitivity_windows is not None and len(sensitivity_windows):
        felt = output_sensitivity(walk, sensitivity_windows, seed, folder)
        save_tensors(felt, folder / SENSITIVITY)
    index_record = {"num_tokens": windows.numel(), "layers": where, "sensitivity": sorted(felt)}
    if tokens:
        index_record["tokens"] = tokens
        _warn_of_rare_experts(tokens)
    write_json(folder / INDEX, index_record)


def _warn_of_rare_experts(tokens: Mapping[str, int]) -> None:
    """Say how many experts lean on the others' statistics because they saw few tokens."""
    counts = {name.rpartition(".")[0]: count for name, count in tokens.items()}
    rare = sorted((n, name) for name, n in counts.items() if n < FEW_TOKENS)
    if rare:
        logger.warning(
            "%d of %d experts saw fewer than %d calibration tokens (%s: %d) and lean on the "
            "statistics of the others; calibrate on more text",
            len(rare),
            len(counts),
            FEW_TOKENS,
            rare[0][1],
            rare[0][0],
        )
