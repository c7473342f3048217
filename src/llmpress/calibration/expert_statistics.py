"""Statistics of experts that saw few tokens, drawn towards those of all experts of their layer.

A layer of a mixture sends each token to a few of its experts, so that one may see a handful of
tokens or none. Its statistics are taken as if some further tokens, typical for all experts of the
layer, had passed it: an expert that saw many is hardly changed, one that saw none is compressed for
what the others see.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmpress.models.experts import expert_matrix

TYPICAL_TOKENS = 0.1
"""How many typical tokens are added, relative to the mean number that an expert saw."""

SHARES_INPUT = ("gate_proj",)
"""Leading matrices whose input is the same space in all experts; others have bases of their own."""


def expert_groups(names: Iterable[str]) -> list[list[str]]:
    """Return the names of the same matrix of all experts of a layer, for each such matrix."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        matrix = expert_matrix(name)
        if matrix is not None:
            groups.setdefault((matrix.group, matrix.matrix), []).append(name)
    return list(groups.values())


def second_moments(
    sums: Mapping[str, Tensor], tokens: Mapping[str, int], widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return ``E[x xᵀ]`` of each input.

    Args:
        sums: ``Σ x xᵀ`` of the inputs that were seen, fp32 ``[in, in]``; overwritten.
        tokens: How many tokens each of them saw.
        widths: Number of features of every input, seen or not.
    """
    moments = {}
    for names in expert_groups(widths):
        seen = [name for name in names if name in sums]
        total = sum(tokens[name] for name in seen)
        width = widths[names[0]]
        typical = torch.eye(width)
        if seen:
            pooled = sum((sums[name] for name in seen[1:]), sums[seen[0]]) / total
            shared = expert_matrix(names[0]).matrix in SHARES_INPUT  # type: ignore[union-attr]
            typical = pooled if shared else typical.to(pooled) * pooled.diagonal().mean()
        added = max(1.0, TYPICAL_TOKENS * total / len(names))
        for name in names:
            own = sums.get(name, torch.zeros_like(typical))
            moments[name] = (own + added * typical) / (tokens.get(name, 0) + added)
    for name in sums.keys() - moments.keys():
        moments[name] = sums[name].div_(tokens[name])
    return {name: moment.cpu().contiguous() for name, moment in moments.items()}


def output_sensitivities(
    sums: Mapping[str, Tensor], tokens: Mapping[str, int], num_tokens: int
) -> dict[str, Tensor]:
    """Return ``E[g²]`` of each output over all tokens, also over those that passed it by.

    Args:
        sums: ``Σ g²`` of every linear, fp32 ``[out]``.
        tokens: How many tokens passed each of them.
        num_tokens: How many there were.
    """
    totals = dict(sums)
    for names in expert_groups(sums):
        passed = sum(tokens[name] for name in names)
        if passed:
            typical = torch.stack([sums[name] for name in names]).sum(dim=0).mean() / passed
            added = TYPICAL_TOKENS * passed / len(names)
            totals.update({name: sums[name] + added * typical for name in names})
    return {name: (total / num_tokens).cpu() for name, total in totals.items()}
