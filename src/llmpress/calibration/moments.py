"""Second moments of the inputs of a block's linear layers."""

import torch
from torch import Tensor, nn

from llmpress.calibration.expert_statistics import second_moments
from llmpress.calibration.linear_calls import LinearCall, rows
from llmpress.core.errors import NumericalError, SourceError
from llmpress.models.architectures import compressible
from llmpress.models.experts import expert_matrix
from llmpress.numerics.linalg import gram


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
        self.complete_leaders()
        widths = {n: width for n, width in self._widths.items() if self.leaders[n] == n}
        return second_moments(sums, self.tokens, widths)

    def complete_leaders(self) -> None:
        """Give an expert that saw no token the leader that it would have had.

        Raises:
            SourceError: Another linear was never used.
        """
        for name in self._widths.keys() - self.leaders.keys():
            self.leaders[name] = _leader_of_unseen(name)

    def follow(self, call: LinearCall) -> None:
        """Note whose input a linear shares."""
        if call.name not in self.leaders:
            shared = (name for name, seen in self._last.items() if seen is call.x)
            self.leaders[call.name] = next(shared, call.name)
        self._last[call.name] = call.x

    def add(self, call: LinearCall) -> None:
        """Add one use of a linear."""
        self.follow(call)
        leader = self.leaders[call.name]
        if leader == call.name:
            flat = rows(call.x.detach(), call.axis).float()  # [tokens, in]
            with torch.autocast(flat.device.type, enabled=False):  # sums must stay fp32
                product = gram(flat)  # [in, in]
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
