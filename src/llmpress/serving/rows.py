"""Layers that add to each row of a batch the delta of its own tenant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmpress.nn.kernels.delta_matmul import RowOwners
from llmpress.nn.kernels.dispatch import uses_compiled, uses_triton
from llmpress.nn.layers.base import CompressedLinear, SumByRow, as_rows
from llmpress.nn.layers.mixed_low_rank import MOST_ROWS

Name = str | None
"""Of a tenant; None for the base alone."""


@dataclass(frozen=True)
class Share:
    """Whose the rows of one input are.

    Attributes:
        groups: The numbers of each tenant's rows, int64 ``[rows of the tenant]``.
        owners: Of the rows that one kernel for all tenants takes.
        many: Tenants with so many rows that unpacking their factors does not count; no kernel.
    """

    groups: dict[Name, Tensor]
    owners: RowOwners
    many: frozenset[Name]


class Rows:
    """Which tenant each row of a batch belongs to."""

    def __init__(self) -> None:
        self.tenants: list[str] = []
        self.packed = False
        self._names: list[Name] = []
        self._heads: list[Name] = []
        self._shares: dict[tuple[int, int, bool, torch.device], Share] = {}

    def number(self, tenants: Iterable[str]) -> None:
        """Let these be the tenants that may have rows, in this order."""
        self.tenants, self._shares = list(tenants), {}

    def assign(self, names: Sequence[Name]) -> None:
        """Let the first dimension of every input be rows of these tenants, at least one."""
        self.packed, self._shares = False, {}
        self._names = self._heads = list(names)

    def assign_packed(self, tokens: Sequence[Name], heads: Sequence[Name]) -> None:
        """Let every input be ``[1, tokens, ...]``, the head's ``[1, tokens that it is for, ...]``.

        Where all are alike, nothing is worked out again.
        """
        if self.packed and tokens == self._names and heads == self._heads:
            return
        self.packed, self._shares = True, {}
        self._names, self._heads = list(tokens), list(heads)

    def share(self, x: Tensor, *, is_head: bool) -> Share:
        """Return whose the rows of ``x [rows, ..., features]``, or of tokens ``[rows, ...]``, are.

        Where ``x`` has a multiple of the rows, as in beam search, each row's tenant has that many
        rows in succession.

        Raises:
            ValueError: Another number of rows.
        """
        flat = x.numel() // x.shape[-1] if x.is_floating_point() else len(x)
        place = len(x), flat, is_head, x.device
        if place not in self._shares:
            names = self._heads if is_head else self._names
            repeats, rest = divmod(len(x), len(names))
            if rest or not repeats or (self.packed and repeats > 1):
                raise ValueError(
                    f"rows: the bank was told of {len(names)} rows, an input has {len(x)}; allowed "
                    f"is {'that number' if self.packed else 'a multiple'}"
                )
            repeated = [name for name in names for _ in range(repeats)]
            self._shares[place] = self._share(repeated, flat // len(x), x.device)
        return self._shares[place]

    def _share(self, names: Sequence[Name], each: int, device: torch.device) -> Share:
        places: dict[Name, list[int]] = {}
        for row, name in enumerate(names):
            places.setdefault(name, []).append(row)
        many = frozenset(name for name, rows in places.items() if each * len(rows) > MOST_ROWS)
        number: dict[Name, int] = {name: n for n, name in enumerate(self.tenants)}
        number |= dict.fromkeys([None, *many], -1)
        owners = RowOwners([number[name] for name in names for _ in range(each)])
        groups = {name: torch.tensor(rows, device=device) for name, rows in places.items()}
        return Share(groups, owners, many)


class PerRow(nn.Module):
    """A module of the base that is another one for the rows of some tenants.

    Args:
        base: The base's own module, from ``x [rows, ..., in]`` to ``[rows, ..., out]``.
        rows: Whose the rows are; asked for every input, so that they may change between two.
        deltas: By tenant, what joins the base's result.
        twins: By tenant, the module with the tenant's own tensors, used instead of the base's.
        is_head: Whether of a packed batch it sees only the tokens that a head is for.
    """

    def __init__(
        self,
        base: nn.Module,
        rows: Rows,
        deltas: Mapping[str, nn.Module],
        twins: Mapping[str, nn.Module],
        *,
        is_head: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.deltas = dict(deltas)  # plain: tenants are not parameters of the model
        self.twins = dict(twins)
        self.is_head = is_head
        self._sums: list[tuple[frozenset[str], SumByRow]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [rows, ..., in]`` to ``[rows, ..., out]``, or packed rows ``[1, rows, ...]``.

        Where tenants have results of different widths, ``-inf`` fills the narrower ones.

        Raises:
            ValueError: ``x`` has no multiple of the bank's rows.
        """
        return self._by_row(x.squeeze(0)).unsqueeze(0) if self.rows.packed else self._by_row(x)

    def _by_row(self, x: Tensor) -> Tensor:
        share = self.rows.share(x, is_head=self.is_head)
        out: Tensor = self._joined(x, share) if self.twins else self.base(x)
        done: set[Name] = set()
        if len(share.many) < len(share.groups) and self._has_kernel(x):
            for names, add in self._row_sums():
                if not names.isdisjoint(share.groups.keys() - share.many):
                    flat = out.reshape(-1, out.shape[-1])
                    out = add(flat.to(x.dtype), as_rows(x), share.owners).view_as(out)
                    done |= names - share.many
        for name, index in share.groups.items():
            if name in self.deltas and name not in done:
                delta = self.deltas[name]
                if len(share.groups) == 1:
                    out = out + delta(x)
                else:
                    out.index_add_(0, index, delta(x[index]))
        return out

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether a kernel for the rows of many tenants can be used."""
        return (
            (uses_triton(x) or uses_compiled(x))
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _row_sums(self) -> list[tuple[frozenset[str], SumByRow]]:
        """Return kernels for rows of many tenants, and whose deltas each takes."""
        if self._sums is None:
            alike: dict[tuple[type[CompressedLinear], object], dict[str, CompressedLinear]] = {}
            for name, delta in self.deltas.items():
                if isinstance(delta, CompressedLinear) and (key := delta.sum_key()) is not None:
                    alike.setdefault((type(delta), key), {})[name] = delta
            self._sums = [
                (frozenset(found), kind.sum_by_row([found.get(name) for name in self.rows.tenants]))
                for (kind, _), found in alike.items()
            ]
        return self._sums

    def _joined(self, x: Tensor, share: Share) -> Tensor:
        groups = share.groups
        parts = [(groups[n], twin(x[groups[n]])) for n, twin in self.twins.items() if n in groups]
        if not parts:
            base: Tensor = self.base(x)
            return base
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
