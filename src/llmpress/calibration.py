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

WINDOWS = "windows.safetensors"
INDEX = "index.json"


@dataclass(frozen=True)
class CalibrationSettings:
    """How much text of which corpora a model is calibrated on.

    Attributes:
        corpora: Names of corpora; mixing domains keeps each of them alive.
        windows: Windows per corpus that statistics and finetuning see.
        validation_windows: Windows per corpus, of other documents, that finetuning is judged by.
        length: Tokens of a window.
        autocast: Run the model in bf16 where a matrix product allows it.
    """

    corpora: tuple[str, ...]
    windows: int
    length: int
    validation_windows: int = 2
    autocast: bool = True

    def __post_init__(self) -> None:
        if not self.corpora or min(self.windows, self.validation_windows) < 1 or self.length < 2:
            raise ValueError(
                "calibration: at least one corpus, one window, one validation window "
                "and two tokens are needed"
            )


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

    def __getitem__(self, name: str) -> InputStatistics:
        """Read the statistics of one layer."""
        file, key = self._where[name]
        try:
            with safe_open(self.folder / file, framework="pt") as moments:
                return InputStatistics(moments.get_tensor(key), self._num_tokens)
        except (FileNotFoundError, SafetensorError) as error:
            raise ArtifactError(
                f"{self.folder / file}: damaged ({error}); calibrate again"
            ) from None

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


def save_calibration(walk: BlockWalk, windows: Tensor, validation: Tensor, folder: Path) -> None:
    """Run a model over its calibration windows and store what the linears' inputs look like.

    Args:
        walk: The model.
        windows: Token ids the statistics are taken over, ``[windows, tokens]``.
        validation: Token ids kept aside for finetuning, ``[windows, tokens]``.
        folder: Where windows, one file of moments per block, and an index are written.
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
    write_json(folder / INDEX, {"num_tokens": windows.numel(), "layers": where})


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
        means = {name: total / self._tokens[name] for name, total in self._sums.items()}
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
                    self._sums[name] = self._sums.get(name, 0) + flat.t() @ flat
                self._tokens[name] = self._tokens.get(name, 0) + flat.shape[0]

        return listen
