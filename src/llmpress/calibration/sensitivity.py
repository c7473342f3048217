"""How much the loss feels an error in each output of each linear layer.

For a small error ``e`` in the outputs of a layer the expected divergence of the model's
predictions from the original's is ``½ Σ_o E[g_o²] e_o²`` to second order, ``g`` the gradient of
the negative log-likelihood with labels drawn from the model itself: the diagonal of the Fisher
information in a layer's outputs. SqueezeLLM (arXiv 2306.07629) and GuidedQuant (arXiv 2505.07004)
use it for weights.

The backward pass goes block by block: in memory are one block, its activations for one window and
two hidden states per window, whatever the depth. What entered each block lies on disk meanwhile.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from llmpress.calibration.expert_statistics import output_sensitivities
from llmpress.calibration.linear_calls import LinearCall, linear_calls, rows
from llmpress.core.artifacts import save_tensors
from llmpress.core.errors import NumericalError
from llmpress.core.progress import progress
from llmpress.models.architectures import compressible, decoder_blocks
from llmpress.models.walk import BlockWalk


def output_sensitivity(
    walk: BlockWalk, windows: Tensor, seed: int = 0, scratch: Path | None = None
) -> dict[str, Tensor]:
    """Return ``E[g²]`` of every output of every linear layer inside the decoder blocks.

    Args:
        walk: The model.
        windows: Token ids, int64 ``[windows, tokens]``.
        seed: Of the labels that are drawn.
        scratch: Existing folder for what entered each block, fp32 ``[windows, tokens, hidden]``
            each; a temporary one by default. Nothing is left there.

    Returns:
        By full layer name, fp32 ``[out]``, in squared nats per unit of squared output, the mean
        over all tokens.

    Raises:
        NumericalError: A gradient is NaN or Inf.
    """
    means: dict[str, Tensor] = {}
    with TemporaryDirectory(dir=scratch) as temporary:
        entered = [Path(temporary) / f"{index}.safetensors" for index in range(len(walk))]
        hidden_states = walk.embed(windows)
        for index in progress(range(len(walk)), "sensitivity, forward"):
            save_tensors({"hidden_states": hidden_states}, entered[index])
            hidden_states = walk.propagate(walk.load(index), index, hidden_states, batch_size=1)
        gradient = _loss_gradient(walk, hidden_states, seed)
        for index in progress(range(len(walk) - 1, -1, -1), "sensitivity, backward"):
            block = walk.load(index)
            hidden_states = load_file(entered[index])["hidden_states"]
            squares = _SquaredGradients(block)
            with linear_calls(block, squares.listen):
                gradient = _backward(walk, block, index, hidden_states, gradient)
            found = output_sensitivities(squares.totals, squares.tokens, windows.numel())
            for name, mean in found.items():
                full_name = f"{walk.prefix}.{index}.{name}"
                if not bool(torch.isfinite(mean).all()):
                    raise NumericalError(f"{full_name}: its gradient is NaN or Inf")
                means[full_name] = mean
    return means


def _backward(
    walk: BlockWalk, block: nn.Module, index: int, hidden_states: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient by a block's input from that by its output, window by window."""
    before = torch.empty_like(gradient)
    for row in range(len(hidden_states)):
        entering = hidden_states[row : row + 1].to(walk.device).requires_grad_(True)
        output = walk.forward(block, index, entering)
        output.backward(gradient[row : row + 1].to(walk.device))
        before[row] = _gradient_of(entering)[0]
    return before


class _SquaredGradients:
    """Sums ``g²`` over all tokens, for each output of each linear of a block."""

    def __init__(self, block: nn.Module) -> None:
        linears = compressible(block).items()
        self.totals = {n: torch.zeros(m.out_features, device=m.weight.device) for n, m in linears}
        self.tokens = dict.fromkeys(self.totals, 0)

    def listen(self, call: LinearCall) -> None:
        """Add the gradients of one use of a linear, when they are there."""
        name, axis = call.name, call.axis

        def add(gradient: Tensor) -> None:  # holds no output: a hook that does keeps it for ever
            flat = rows(gradient.float(), axis)
            self.totals[name] += flat.square().sum(dim=0)
            self.tokens[name] += len(flat)

        call.y.register_hook(add)


def _loss_gradient(walk: BlockWalk, hidden_states: Tensor, seed: int) -> Tensor:
    """Return the gradient of the loss by the last block's output, ``[windows, tokens, hidden]``."""
    model = copy.deepcopy(walk.skeleton)
    _, blocks = decoder_blocks(model)
    stand_ins = [_Constant(block, walk) for block in blocks]
    for index, stand_in in enumerate(stand_ins):
        blocks[index] = stand_in
    outside = {
        name: walk.source.tensor(name)
        for name in walk.source.names()
        if not name.startswith(f"{walk.prefix}.")
    }
    model.load_state_dict(outside, assign=True, strict=False)
    model.tie_weights()
    model.float().to(walk.device).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for row in progress(range(len(hidden_states)), "sensitivity, loss"):
        leaving = hidden_states[row : row + 1].to(walk.device).requires_grad_(True)
        stand_ins[-1].output = leaving
        tokens = torch.zeros(leaving.shape[:2], dtype=torch.int64, device=walk.device)
        logits = model(tokens, use_cache=False).logits[0].float()  # [tokens, vocabulary]
        reached = logits.detach().softmax(dim=-1).cumsum(dim=-1).cpu()  # torch.multinomial is slow
        drawn = torch.rand(len(reached), 1, generator=generator) * reached[:, -1:]
        labels = torch.searchsorted(reached, drawn).squeeze(1)
        functional.cross_entropy(logits, labels.to(walk.device), reduction="sum").backward()
        gradients.append(_gradient_of(leaving))
    return torch.cat(gradients)


def _gradient_of(states: Tensor) -> Tensor:
    if states.grad is None:
        raise NumericalError("the loss does not depend on a decoder block's input")
    return states.grad.detach().cpu()


class _Constant(nn.Module):
    """Stands in for a decoder block: passes hidden states on, or gives out what it was told."""

    def __init__(self, block: nn.Module, walk: BlockWalk) -> None:
        super().__init__()
        self._attributes = {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.output: Tensor | None = None
        self._walk = walk

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["_attributes"][name]

    def forward(self, hidden_states: Tensor, **_: object) -> Any:
        return self._walk.as_returned(hidden_states if self.output is None else self.output)
