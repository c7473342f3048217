"""What calibration text tells of a model: the second moment of every linear layer's input."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llmpress.calibration.expert_statistics import second_moments
from llmpress.calibration.linear_calls import LinearCall, linear_calls, rows
from llmpress.calibration.sensitivity import output_sensitivity
from llmpress.core.artifacts import read_json, read_provenance, save_tensors, write_json
from llmpress.core.errors import ArtifactError, NumericalError, SourceError
from llmpress.methods.base import InputStatistics
from llmpress.models.architectures import compressible
from llmpress.models.experts import expert_matrix
from llmpress.models.walk import BlockWalk, progress

WINDOWS = "windows.safetensors"
INDEX = "index.json"
SENSITIVITY = "sensitivity.safetensors"
FEW_TOKENS = 100
"""An expert that saw fewer than this is worth a warning."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSettings:
    """How much text of which corpora a model is calibrated on.

    Attributes:
        corpora: Names of corpora; mixing domains keeps each of them alive.
        windows: Windows per text that statistics and finetuning see.
        validation_windows: Windows per text, of other documents, that finetuning is judged by.
        length: Tokens of a window.
        sensitivity_windows: Windows per text of which gradients are taken too, at most
            ``windows``: how much the loss feels each output of each layer. 0 leaves that out.
        autocast: Run the model in bf16 where a matrix product allows it.
        tasks: Names of tasks whose training items are text too: what a fine-tuned model was made
            for.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    validation_windows: int = 2
    sensitivity_windows: int = 4
    autocast: bool = True
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.corpora or min(self.windows, self.validation_windows) < 1 or self.length < 2:
            raise ValueError(
                "calibration: at least one corpus, one window, one validation window "
                "and two tokens are needed"
            )
        if self.sensitivity_windows < 0:
            raise ValueError("calibration: sensitivity_windows must not be negative")

    @property
    def num_texts(self) -> int:
        """How many texts give windows."""
        return len(self.corpora) + len(self.tasks)


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


class InputMoments:
    """Collects ``Σ x xᵀ`` of the inputs of a block's linears: a listener of `linear_calls`.

    Linears that are given the very same tensor (q, k and v; gate and up) share one sum, named after
    the first of them.

    Attributes:
        leaders: For each linear, whose sum it shares.
        tokens: For each leader that was used, how many tokens it got.
    """

    def __init__(self, block: nn.Module) -> None:
        self._widths = {name: linear.in_features for name, linear in compressible(block).items()}
        self.leaders: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def moments(self) -> dict[str, Tensor]:
        """Return ``E[x xᵀ]`` by leader, fp32 ``[in, in]``, and let go of what was collected.

        Raises:
            NumericalError: An input held NaN or Inf.
        """
        sums, self._sums = self._sums, {}
        self._last.clear()
        for name, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericalError(f"{name}: its inputs hold NaN or Inf during calibration")
        for name in self._widths.keys() - self.leaders.keys():
            self.leaders[name] = _leader_of_unseen(name)
        widths = {n: width for n, width in self._widths.items() if self.leaders[n] == n}
        return second_moments(sums, self.tokens, widths)

    def add(self, call: LinearCall) -> None:
        """Add one use of a linear."""
        leader = self.leaders.get(call.name)
        if leader is None:
            leader = next((n for n, seen in self._last.items() if seen is call.x), call.name)
            self.leaders[call.name] = leader
        self._last[call.name] = call.x
        if leader == call.name:
            flat = rows(call.x.detach(), call.axis).float()  # [tokens, in]
            with torch.autocast(flat.device.type, enabled=False):  # sums must stay fp32
                product = flat.t() @ flat  # [in, in]
                if leader in self._sums:
                    self._sums[leader] += product  # in place: these are the largest tensors here
                else:
                    self._sums[leader] = product
            self.tokens[leader] = self.tokens.get(leader, 0) + flat.shape[0]


def _leader_of_unseen(name: str) -> str:
    """Return whose input a linear that saw no token would have shared.

    Raises:
        SourceError: It is no expert's, so it should have seen all of them.
    """
    matrix = expert_matrix(name)
    if matrix is None:
        raise SourceError(
            f"{name}: the model computes with this linear in a way that cannot be followed, so it "
            "has no statistics; llmpress follows calls and `weight @ x`"
        )
    return name.removesuffix("up_proj") + "gate_proj" if matrix.matrix == "up_proj" else name
