"""What calibration text tells of a model: the second moment of every linear layer's input."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llmpress.artifacts import read_json, read_provenance, save_tensors, write_json
from llmpress.blocks import BlockWalk, progress
from llmpress.errors import ArtifactError, NumericalError
from llmpress.methods.base import InputStatistics
from llmpress.sensitivity import output_sensitivity

WINDOWS = "windows.safetensors"
INDEX = "index.json"
SENSITIVITY = "sensitivity.safetensors"


@dataclass(frozen=True)
class CalibrationSettings:
    """How much text of which corpora a model is calibrated on.

    Attributes:
        corpora: Names of corpora; mixing domains keeps each of them alive.
        windows: Windows per corpus that statistics and finetuning see.
        validation_windows: Windows per corpus, of other documents, that finetuning is judged by.
        length: Tokens of a window.
        sensitivity_windows: Windows per corpus of which gradients are taken too, at most
            ``windows``: how much the loss feels each output of each layer. 0 leaves that out.
        autocast: Run the model in bf16 where a matrix product allows it.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    validation_windows: int = 2
    sensitivity_windows: int = 4
    autocast: bool = True

    def __post_init__(self) -> None:
        if not self.corpora or min(self.windows, self.validation_windows) < 1 or self.length < 2:
            raise ValueError(
                "calibration: at least one corpus, one window, one validation window "
                "and two tokens are needed"
            )
        if self.sensitivity_windows < 0:
            raise ValueError("calibration: sensitivity_windows must not be negative")


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
        return InputStatistics(moment, self._num_tokens, felt)

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
    for index in progress(range(len(walk)), "calibrate blocks"):
        block = walk.load(index)
        file = f"moments-{index:03d}.safetensors"
        with InputMoments(block) as inputs:
            hidden_states = walk.propagate(block, index, hidden_states, in_place=True)
        moments = inputs.moments()
        save_tensors(moments, folder / file)
        for name, leader in inputs.leaders.items():
            where[f"{walk.prefix}.{index}.{name}"] = (file, leader)
        del block, inputs, moments  # before the next block is there
    felt: dict[str, Tensor] = {}
    if sensitivity_windows is not None and len(sensitivity_windows):
        felt = output_sensitivity(walk, sensitivity_windows, seed, folder)
        save_tensors(felt, folder / SENSITIVITY)
    index_record = {"num_tokens": windows.numel(), "layers": where, "sensitivity": sorted(felt)}
    write_json(folder / INDEX, index_record)


class InputMoments:
    """Collects ``Σ x xᵀ`` of the inputs of a block's linears while it runs, inside a ``with``.

    Linears that are given the very same tensor (q, k and v; gate and up) share one sum, named after
    the first of them.
    """

    def __init__(self, block: nn.Module) -> None:
        self.linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        self.leaders: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "InputMoments":
        """Start listening."""
        for name, linear in self.linears.items():
            self._hooks.append(linear.register_forward_pre_hook(self._listener(name)))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        self._last.clear()

    def moments(self) -> dict[str, Tensor]:
        """Return ``E[x xᵀ]`` by leader, fp32 ``[in, in]``.

        Raises:
            NumericalError: An input held NaN or Inf.
        """
        means = {name: total.div_(self._tokens[name]) for name, total in self._sums.items()}
        self._sums = {}
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise NumericalError(f"{name}: its inputs hold NaN or Inf during calibration")
        return {name: mean.cpu().contiguous() for name, mean in means.items()}

    def _listener(self, name: str):  # type: ignore[no-untyped-def]
        def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            leader = self.leaders.get(name)
            if leader is None:
                leader = next((n for n, seen in self._last.items() if seen is x), name)
                self.leaders[name] = leader
            self._last[name] = x
            if leader == name:
                flat = x.detach().reshape(-1, x.shape[-1]).float()  # [tokens, in]
                with torch.autocast(x.device.type, enabled=False):  # sums must stay fp32
                    product = flat.t() @ flat  # [in, in]
                    if name in self._sums:
                        self._sums[name] += product  # in place: these are the largest tensors here
                    else:
                        self._sums[name] = product
                self._tokens[name] = self._tokens.get(name, 0) + flat.shape[0]

        return listen
