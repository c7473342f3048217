"""Layers that add to each row of a batch the delta of its own tenant."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmpress.nn.kernels.dispatch import uses_compiled, uses_triton
from llmpress.nn.layers.base import CompressedLinear, SumByRow, as_rows

Name = str | None
"""Of a tenant; None for the base alone."""

MOST_SHAPES = 2
"""Batches whose work items are kept: those of a prompt and of its further tokens."""


class Rows:
    """Which tenant each row of a batch belongs to.

    Args:
        names: A tenant for each row, at least one.
    """

    def __init__(self, names: Sequence[Name]) -> None:
        self.names = list(names)
        self._place: tuple[int, torch.device] | None = None
        self._groups: dict[Name, Tensor] = {}

    def groups(self, x: Tensor) -> dict[Name, Tensor]:
        """Return the numbers of each tenant's rows in ``x``, int64 ``[rows of the tenant]``.

        Where ``x`` has a multiple of the rows, as in beam search, each row's tenant has that many
        rows in succession.

        Raises:
            ValueError: Another number of rows.
        """
        if (len(x), x.device) != self._place:
            repeats, rest = divmod(len(x), len(self.names))
            if rest or not repeats:
                raise ValueError(
                    f"rows: the bank was told of {len(self.names)} rows, an input has {len(x)}; "
                    "allowed is a multiple"
                )
            tenants = [name for name in self.names for _ in range(repeats)]
            self._groups = {
                name: torch.tensor(
                    [row for row, tenant in enumerate(tenants) if tenant == name], device=x.device
                )
                for name in dict.fromkeys(tenants)
            }
            self._place = (len(x), x.device)
        return self._groups


class PerRow(nn.Module):
    """A module of the base that is another one for the rows of some tenants.

    Args:
        base: The base's own module, from ``x [rows, ..., in]`` to ``[rows, ..., out]``.
        rows: Whose the rows are.
        deltas: By tenant, what joins the base's result.
        twins: By tenant, the module with the tenant's own tensors, used instead of the base's.
    """

    def __init__(
        self,
        base: nn.Module,
        rows: Rows,
        deltas: Mapping[str, nn.Module],
        twins: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.deltas = dict(deltas)  # plain: tenants are not parameters of the model
        self.twins = dict(twins)
        self._sums: dict[int, SumByRow | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [rows, ..., in]`` to ``[rows, ..., out]``.

        Where tenants have results of different widths, ``-inf`` fills the narrower ones.

        Raises:
            ValueError: ``x`` has no multiple of the bank's rows.
        """
        groups = self.rows.groups(x)
        out: Tensor = self._joined(x, groups) if self.twins else self.base(x)
        if (add := self._sum_of_rows(x)) is not None:
            flat = out.reshape(-1, out.shape[-1])
            return add(flat.to(x.dtype), as_rows(x)).view_as(out)
        for name, delta in self.deltas.items():
            out.index_add_(0, groups[name], delta(x[groups[name]]))
        return out

    def _sum_of_rows(self, x: Tensor) -> SumByRow | None:
        """Return the kernel for many tenants; None where there is none or it cannot be used."""
        if (
            not self.deltas
            or not (uses_triton(x) or uses_compiled(x))
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return None
        count = x.numel() // x.shape[-1]
        if count not in self._sums:
            while len(self._sums) > MOST_SHAPES:
                self._sums.pop(next(iter(self._sums)))
            self._sums[count] = self._sum_by_row(count)
        return self._sums[count]

    def _sum_by_row(self, count: int) -> SumByRow | None:
        layers = [d for d in self.deltas.values() if isinstance(d, CompressedLinear)]
        if len(layers) < len(self.deltas) or len({type(layer) for layer in layers}) > 1:
            return None
        place: dict[Name, int] = {name: number for number, name in enumerate(self.deltas)}
        repeats = count // len(self.rows.names)
        owners = [place.get(name, -1) for name in self.rows.names for _ in range(repeats)]
        return type(layers[0]).sum_by_row(layers, owners)

    def _joined(self, x: Tensor, groups: dict[Name, Tensor]) -> Tensor:
        parts = [(groups[name], twin(x[groups[name]])) for name, twin in self.twins.items()]
        others = [index for name, index in groups.items() if name not in self.twins]
        if others:
            rows = torch.cat(others)
            # The base sees all rows, so that these are what it gives without tenants, bit for bit;
            # only embeddings do not know the tokens of other tenants.
            is_lookup = isinstance(self.base, nn.Embedding)
            parts.append((rows, self.base(x[rows]) if is_lookup else self.base(x)[rows]))
        like = parts[0][1]
        width = max(part.shape[-1] for _, part in parts)
        out: Tensor = like.new_full((len(x), *like.shape[1:-1], width), -torch.inf)
        for rows, part in parts:
            out[rows, ..., : part.shape[-1]] = part
        return out

    @property
    def weight(self) -> Tensor:
        """None for all rows, so a module that reads it instead of calling this one cannot run.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self.base).__name__}: its weight is read without a call, and every row has its "
            "own; let DeltaBank.use have one delta for all rows"
        )
