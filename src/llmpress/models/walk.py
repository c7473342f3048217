"""The engine: a decoder whose blocks are in memory one at a time.

Whatever walks a model here (calibration, block-wise finetuning) holds the embeddings, one block and
one buffer of hidden states ``[windows, tokens, hidden]``, whatever the depth.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpress.core.errors import NumericalError, SourceError
from llmpress.models.architectures import decoder_blocks
from llmpress.nn.layers import CompressedLinear

PROPAGATE_WINDOWS, PROPAGATE_TOKENS = 8, 4096
"""What is computed at a time without gradients: activations of long windows stay small, too."""


_MISUSED = (TypeError, ValueError, IndexError, RuntimeError)
"""What a decoder raises whose blocks return something else than it reads."""


class TensorSource(Protocol):
    """A checkpoint, read tensor by tensor."""

    def names(self) -> list[str]:
        """Return the names of all stored tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        ...


class BlockWalk:
    """Runs hidden states through a model's decoder blocks, loading each block when it is needed.

    Args:
        skeleton: The model with parameters on the meta device; linears may already be replaced by
            compressed ones.
        source: Where its tensors come from.
        device: Where blocks compute.
        autocast: Compute in bf16 where a matrix product allows it.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        source: TensorSource,
        *,
        device: torch.device,
        autocast: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.source = source
        self.device = device
        self.autocast = autocast
        self.prefix, self.blocks = decoder_blocks(skeleton)
        self.arguments: list[dict[str, Any]] = []
        self._returned: Any = None  # by the first block that ran, of the first window

    def __len__(self) -> int:
        """Return the number of decoder blocks."""
        return len(self.blocks)

    def embed(self, windows: Tensor) -> Tensor:
        """Return what enters the first block, and note what else each block is called with.

        Args:
            windows: Token ids, int64 ``[windows, tokens]``.

        Returns:
            Hidden states, fp32 ``[windows, tokens, hidden]`` on the CPU.

        Raises:
            SourceError: The architecture calls its blocks in another way than most.
        """
        decoder = copy.deepcopy(self.skeleton.get_decoder())
        name = next(n for n, m in self.skeleton.named_modules() if m is self.skeleton.get_decoder())
        _, blocks = decoder_blocks(decoder)
        recorders = [_Recorder(block, self) for block in blocks]
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        outside = {
            tensor.removeprefix(f"{name}."): self.source.tensor(tensor)
            for tensor in self.source.names()
            if tensor.startswith(f"{name}.") and not tensor.startswith(f"{self.prefix}.")
        }
        decoder.load_state_dict(outside, assign=True)
        decoder.float().to(self.device)
        hidden = torch.empty(0)
        with torch.no_grad():
            for row, window in enumerate(windows):
                self._call(decoder, window.unsqueeze(0).to(self.device), recorders[0])
                states = recorders[0].hidden_states
                if row == 0:
                    hidden = torch.empty(*windows.shape, states.shape[-1])
                hidden[row] = states[0]
        self.arguments = [recorder.arguments for recorder in recorders]
        return hidden

    def _call(self, decoder: nn.Module, window: Tensor, first: "_Recorder") -> None:
        """Run a decoder of recorders; where it wants more of its blocks, the first shows what."""
        try:
            try:
                decoder(window, use_cache=False)
            except _MISUSED as error:
                if self._returned is not None or isinstance(error, torch.OutOfMemoryError):
                    raise
                self.arguments = [first.arguments]
                self.forward(self.load(0), 0, first.hidden_states)
                decoder(window, use_cache=False)
        except _MISUSED as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).partition("\n")[0]
            raise SourceError(
                f"{type(self.skeleton).__name__} calls its decoder blocks in a way that "
                f"cannot be walked block by block ({reason})"
            ) from None

    def load(self, index: int) -> nn.Module:
        """Return decoder block ``index`` with its weights, on the device.

        Weights become fp32. Under autocast the bf16 weights of linears stay as they are stored:
        they would be rounded back to the same values before each product.

        Raises:
            SourceError: The stored tensors have other names or shapes than the module's.
        """
        prefix = f"{self.prefix}.{index}."
        names = [name for name in self.source.names() if name.startswith(prefix)]
        block = copy.deepcopy(self.blocks[index])
        try:
            block.load_state_dict(
                {n.removeprefix(prefix): self.source.tensor(n) for n in names}, assign=True
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{prefix.removesuffix('.')}: its stored tensors are not those of the module, so "
                f"{type(self.skeleton).__name__} cannot be walked block by block ({reason})"
            ) from None
        for module in block.modules():
            if not isinstance(module, CompressedLinear):
                stays = self.autocast and isinstance(module, nn.Linear)
                for parameter in module.parameters(recurse=False):
                    if not (stays and parameter.dtype == torch.bfloat16):
                        parameter.data = parameter.data.float()
        return block.to(self.device).eval().requires_grad_(False)

    def forward(self, block: nn.Module, index: int, hidden_states: Tensor) -> Tensor:
        """Run one batch ``[batch, tokens, hidden]`` through a loaded block; gradients are kept."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = block(hidden_states.to(self.device), **self.arguments[index])
        if self._returned is None:
            self._returned = output
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.float()

    def as_returned(self, hidden_states: Tensor) -> Any:
        """Return hidden states as the blocks do, of which one has run: alone, or in a tuple."""
        if isinstance(self._returned, tuple):
            return (hidden_states, *self._returned[1:])
        return hidden_states

    @torch.no_grad()
    def propagate(
        self,
        block: nn.Module,
        index: int,
        hidden_states: Tensor,
        batch_size: int | None = None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """Run all hidden states ``[windows, tokens, hidden]`` through a block, on the CPU again.

        Args:
            block: Block ``index``, loaded.
            index: Which block it is.
            hidden_states: What enters the block.
            batch_size: Windows computed at a time; by default eight, but no more than 4096 tokens.
            in_place: Overwrite ``hidden_states`` instead of allocating a second buffer.

        Raises:
            NumericalError: The block's output holds NaN or Inf.
        """
        if batch_size is None:
            batch_size = max(1, min(PROPAGATE_WINDOWS, PROPAGATE_TOKENS // hidden_states.shape[1]))
        output = hidden_states if in_place else torch.empty_like(hidden_states)
        for start in range(0, len(hidden_states), batch_size):
            rows = slice(start, start + batch_size)
            result = self.forward(block, index, hidden_states[rows])
            if not bool(torch.isfinite(result).all()):
                raise NumericalError(
                    f"{self.prefix}.{index}: the output holds NaN or Inf; "
                    "check the weights, or turn off bf16 autocast"
                )
            output[rows] = result
        return output


class _Recorder(nn.Module):
    """Stands in for a decoder block: passes hidden states on and keeps what it was called with."""

    def __init__(self, block: nn.Module, walk: BlockWalk) -> None:
        super().__init__()
        self._walk = walk
        self._attributes = {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.hidden_states: Tensor = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["_attributes"][name]

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
        self.hidden_states = hidden_states
        self.arguments = {k: v for k, v in arguments.items() if k != "past_key_values"}
        return self._walk.as_returned(hidden_states)
