"""Inputs of a layer in the model as it is so far: layers before it are compressed already.

The true-sequential order of GPTQ: a layer is compressed for the inputs that it will get (q, k, v,
then o, then gate and up, then down), and block after block sees what the ones before have become.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from llmpress.calibration.linear_calls import LinearCall, linear_calls, rows
from llmpress.calibration.moments import InputMoments
from llmpress.core.errors import SourceError
from llmpress.methods.base import InputStatistics
from llmpress.models.architectures import compressible
from llmpress.models.experts import expert_matrix
from llmpress.models.walk import BlockWalk


class SequentialStatistics(Mapping[str, InputStatistics]):
    """Input statistics by layer name, each measured when it is asked for.

    Layers have to be asked for block by block. In memory are one block and the hidden states of all
    windows, fp32 ``[windows, tokens, hidden]``.

    Args:
        walk: The model with its dense weights.
        windows: Token ids, int64 ``[windows, tokens]``.
        known: Statistics of the model as it was; the outputs' sensitivities are taken from them.
    """

    def __init__(
        self, walk: BlockWalk, windows: Tensor, known: Mapping[str, InputStatistics]
    ) -> None:
        self._walk = walk
        self._known = known
        self._hidden_states = walk.embed(windows)
        self._index = -1
        self._block = nn.Module()
        self._moments: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def __getitem__(self, name: str) -> InputStatistics:
        """Measure what enters the layer ``name``, unless its neighbours' inputs are the same."""
        known = self._known[name]
        own = self._enter(name)
        if own not in self._moments:
            self._measure(own)
        tokens = self._tokens[own]
        return InputStatistics(self._moments[own], tokens, known.output_sensitivity)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all layers."""
        return iter(self._known)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._known)

    @torch.no_grad()
    def changed(self, name: str, difference: Tensor) -> None:
        """Take note that the weight of layer ``name`` has become another one.

        Args:
            name: Full name of the layer.
            difference: ``Ŵ - W``, fp32 ``[out, in]``.
        """
        own = self._enter(name)
        linear = self._block.get_submodule(own)
        weight: Tensor = linear.weight  # type: ignore[assignment]  # it is a linear's
        changed = weight.float() + difference.to(weight.device)
        linear.weight = nn.Parameter(changed, requires_grad=False)
        self._moments.pop(own, None)

    def _enter(self, name: str) -> str:
        """Load the block of a layer, run the states through the ones before; return its own name.

        Raises:
            ValueError: The layer lies in a block that is done.
        """
        index, _, own = name.removeprefix(f"{self._walk.prefix}.").partition(".")
        if int(index) < self._index:
            raise ValueError(f"{name}: block {index} is done, {self._index} is being compressed")
        while self._index < int(index):
            if self._index >= 0:
                self._hidden_states = self._walk.propagate(
                    self._block, self._index, self._hidden_states, in_place=True
                )
            self._index += 1
            self._block = self._walk.load(self._index)
            self._moments, self._tokens = {}, {}
        return own

    def _measure(self, own: str) -> None:
        """Run the block as it is now; keep the moments of this layer and of those that go with it.

        The experts of one layer are measured together: rare ones lean on the others.
        """
        inputs = _Inputs(self._block, own) if expert_matrix(own) is None else _Experts(self._block)
        with linear_calls(self._block, inputs.add):
            self._walk.propagate(self._block, self._index, self._hidden_states)
        for name, moment, tokens in inputs.found(own):
            self._moments[name], self._tokens[name] = moment, tokens


class _Inputs:
    """The moment of what enters one layer, and which others are given the very same tensor."""

    def __init__(self, block: nn.Module, own: str) -> None:
        width = compressible(block)[own].in_features
        self._own, self._tokens = own, 0
        self._total = torch.zeros(width, width)
        self._x: Tensor | None = None
        self._names = {own}

    def add(self, call: LinearCall) -> None:
        if call.name == self._own:
            self._x = call.x
            flat = rows(call.x, call.axis).float()  # [tokens, in]
            with torch.autocast(flat.device.type, enabled=False):  # sums must stay fp32
                self._total = self._total.to(flat.device) + flat.t() @ flat
            self._tokens += flat.shape[0]
        elif call.x is self._x:
            self._names.add(call.name)

    def found(self, _: str) -> Iterator[tuple[str, Tensor, int]]:
        if not self._tokens:
            raise SourceError(f"{self._own}: the model computes without calling this linear")
        moment = self._total / self._tokens
        return ((name, moment, self._tokens) for name in self._names)


class _Experts(InputMoments):
    """The moments of the same matrix, and of those with the same input, of every expert."""

    def found(self, own: str) -> Iterator[tuple[str, Tensor, int]]:
        moments = self.moments()
        wanted = expert_matrix(self.leaders[own])
        for name, leader in self.leaders.items():
            matrix = expert_matrix(leader)
            if matrix is not None and wanted is not None and matrix.matrix == wanted.matrix:
                yield name, moments[leader], self.tokens.get(leader, 0)
