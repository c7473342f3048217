"""Mixtures of experts with one linear layer for each matrix of each expert.

transformers stores the experts of a layer as two tensors ``[experts, out, in]``. Compression is
per matrix: an expert's statistics, rank and codebook are its own. So the fused module is replaced
by one linear per matrix, under the names that published checkpoints use.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmpress.core.errors import SourceError
from llmpress.models.architectures import replace_module

MATRICES = ("gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r"^(?P<group>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>[^.]+)$")


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``.

    Args:
        hidden: Width of the hidden states.
        intermediate: Width between the matrices.
        act_fn: Activation.
    """

    def __init__(self, hidden: int, intermediate: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [tokens, hidden]`` to ``[tokens, hidden]``."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


class SeparateExperts(nn.ModuleList):
    """The experts of a layer; computes what transformers' fused module of the same layer does."""

    @classmethod
    def from_fused(cls, fused: nn.Module) -> "SeparateExperts":
        """Split a fused module; nothing is computed when its tensors are on the meta device."""
        gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
        count, hidden, intermediate = down.shape
        with torch.device("meta"):
            experts = cls(
                Expert(hidden, intermediate, fused.act_fn)  # type: ignore[arg-type]  # any module
                for _ in range(count)
            )
        for name, weight in matrices(gate_up, down).items():
            linear = experts.get_submodule(name)
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        return experts.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: The experts of each token, int64 ``[tokens, chosen]``; a number that no
                expert has stands for none.
            top_k_weights: Their weights, ``[tokens, chosen]``.
        """
        total = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number < len(self):
                token, place = torch.where(top_k_index == number)
                output = self[number](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


class ExpertMatrix(NamedTuple):
    """Where a linear layer stands among those of a mixture's experts.

    Attributes:
        group: Name of the layer's list of experts.
        number: Of the expert.
        matrix: Which of an expert's matrices.
    """

    group: str
    number: int
    matrix: str


def expert_matrix(name: str) -> ExpertMatrix | None:
    """Return what expert a linear's name belongs to; None for a layer that every token passes."""
    found = _EXPERT.match(name)
    return found and ExpertMatrix(found["group"], int(found["number"]), found["matrix"])


def matrices(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Return the matrix ``[out, in]`` of each linear of fused experts, by its name among them.

    Args:
        gate_up: ``[experts, 2 x inner, hidden]``.
        down: ``[experts, hidden, inner]``.
    """
    inner = down.shape[2]
    found = {}
    for number in range(len(down)):
        found[f"{number}.gate_proj"] = gate_up[number, :inner]
        found[f"{number}.up_proj"] = gate_up[number, inner:]
        found[f"{number}.down_proj"] = down[number]
    return found


def joined(matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the fused tensors of all `matrices`."""
    experts = [
        [matrices[f"{number}.{m}"] for m in MATRICES] for number in range(len(matrices) // 3)
    ]
    gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    return gate_up, torch.stack([down for *_, down in experts])


def fused_experts(model: nn.Module) -> list[str]:
    """Return the names of all fused modules of experts.

    Raises:
        SourceError: Experts that compute in another way than gated pairs of matrices.
    """
    found = {name: module for name, module in model.named_modules() if _is_fused(module)}
    for name, module in found.items():
        _check_form(name, module)
    return list(found)


def separate_experts(model: nn.Module) -> None:
    """Replace every fused module of experts, in place.

    Raises:
        SourceError: Experts that compute in another way than gated pairs of matrices.
    """
    for name in fused_experts(model):
        replace_module(model, name, SeparateExperts.from_fused(model.get_submodule(name)))


def _is_fused(module: nn.Module) -> bool:
    tensors = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(tensor, nn.Parameter) and tensor.ndim == 3 for tensor in tensors)


def _check_form(name: str, module: nn.Module) -> None:
    usual = {
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_gate": True,
        "has_post_expert_norm": False,
    }
    for attribute, value in usual.items():
        if getattr(module, attribute, value) != value:
            raise SourceError(
                f"{name}: experts with {attribute}={not value} ({type(module).__name__}) cannot be "
                "taken apart; llmpress knows gated experts without biases, as Mixtral's or Qwen's"
            )
    gate_up, down = (module.get_parameter(part).shape for part in ("gate_up_proj", "down_proj"))
    if gate_up != (down[0], 2 * down[2], down[1]):
        raise SourceError(
            f"{name}: experts of shapes {list(gate_up)} and {list(down)} ({type(module).__name__}) "
            "cannot be taken apart; llmpress knows [experts, 2 x inner, hidden] and [experts, "
            "hidden, inner]"
        )
