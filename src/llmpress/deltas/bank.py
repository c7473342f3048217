"""Many compressed deltas beside one base model in memory, one for all rows or one for each row.

Rows are the first dimension of what a module is given: ``x [rows, ..., features]``.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmpress.core.errors import ArtifactError
from llmpress.deltas.applying import (
    CARRIED,
    ModelDelta,
    Swap,
    base_fingerprint,
    check_bare,
    fitted_delta,
    swap_module,
)
from llmpress.models.experts import expert_matrix
from llmpress.nn.kernels.delta_matmul import RowDeltas, delta_matmul
from llmpress.nn.kernels.dispatch import uses_triton
from llmpress.nn.layers import MixedLowRankLinear
from llmpress.nn.layers.base import as_rows, frozen

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
        self._kernel_rows: dict[int, RowDeltas | None] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [rows, ..., in]`` to ``[rows, ..., out]``.

        Where tenants have results of different widths, ``-inf`` fills the narrower ones.

        Raises:
            ValueError: ``x`` has no multiple of the bank's rows.
        """
        groups = self.rows.groups(x)
        out: Tensor = self._joined(x, groups) if self.twins else self.base(x)
        if (rows := self._rows_of_kernel(x)) is not None:
            flat = out.reshape(-1, out.shape[-1])
            return delta_matmul(as_rows(x), flat.to(x.dtype), rows).view_as(out)
        for name, delta in self.deltas.items():
            out.index_add_(0, groups[name], delta(x[groups[name]]))
        return out

    def _rows_of_kernel(self, x: Tensor) -> RowDeltas | None:
        """Return what the kernel for many tenants needs; None where it cannot be used."""
        if (
            not self.deltas
            or not uses_triton(x)
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            return None
        count = x.numel() // x.shape[-1]
        if count not in self._kernel_rows:
            while len(self._kernel_rows) > MOST_SHAPES:
                self._kernel_rows.pop(next(iter(self._kernel_rows)))
            self._kernel_rows[count] = self._row_deltas(count)
        return self._kernel_rows[count]

    def _row_deltas(self, count: int) -> RowDeltas | None:
        layers = [d for d in self.deltas.values() if isinstance(d, MixedLowRankLinear)]
        groups = [found for d in layers if (found := d.triplet_groups()) is not None]
        if (
            len(groups) < len(self.deltas)
            or any(layer.bias is not None for layer in layers)
            or len({layer.group_size for layer in layers}) > 1
        ):
            return None
        place: dict[Name, int] = {name: number for number, name in enumerate(self.deltas)}
        repeats = count // len(self.rows.names)
        tenants = [place.get(name, -1) for name in self.rows.names for _ in range(repeats)]
        return RowDeltas(groups, tenants, layers[0].group_size)

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


@dataclass
class _Tenant:
    """A delta and, by name of a module, what a row of this tenant has there.

    Attributes:
        delta: What `ModelDelta.put_on` puts on for all rows.
        deltas: What joins a linear's result.
        twins: What is used instead of the base's module.
        whole: Modules with tensors of their own that other modules lie in.
        nbytes: Of all tensors that are not the base's.
    """

    delta: ModelDelta
    deltas: dict[str, nn.Module] = field(default_factory=dict)
    twins: dict[str, nn.Module] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    nbytes: int = 0


class DeltaBank:
    """Many compressed deltas on one base model, which is in memory once.

    A row is what is generated for one request. `use` says whose delta a row gets: one for all rows,
    or another for each. In between nothing is read and nothing is built. Results are those of a
    model with that delta alone: exactly so with one delta for all rows, to rounding with one for
    each; rows without a delta are the base's, bit for bit. Tensors that a delta keeps exactly are
    the tenant's own too. `close`, or the end of a ``with`` block, gives the model back with its own
    tensors under their names; only a mixture's experts stay taken apart, one linear for each
    matrix.

    With ``model.generate``, tell `use` of as many rows as there are prompts; ``num_beams`` and
    ``num_return_sequences`` are followed. Where tenants of one batch have vocabularies of different
    sizes, the logits of the smaller ones are filled with ``-inf``, which is never chosen. The
    generation settings, such as the tokens that end and pad, are the model's for all rows. Move the
    model to its device before the first `add`; one thread at a time calls `use` and the model.

    Args:
        model: The base model, dense or itself compressed.
        base_folder: Where the base was loaded from, to compare fingerprints; by default what the
            model says of itself, when that is a local folder.

    Raises:
        ArtifactError: The model already carries a delta or another bank.
    """

    def __init__(self, model: PreTrainedModel, *, base_folder: Path | str | None = None) -> None:
        check_bare(model, type(self).__name__)
        self.model = model
        self._base = base_fingerprint(model, None if base_folder is None else Path(base_folder))
        self._tenants: dict[str, _Tenant] = {}
        self._rows: Name | list[Name] = None
        self._swap = Swap()
        setattr(model, CARRIED, self)

    def __str__(self) -> str:
        return "a DeltaBank; close it first"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the names of all deltas, in the order in which they were added."""
        return list(self._tenants)

    def add(self, name: str, folder: Path | str) -> None:
        """Read, verify and build a delta; `use` puts it on.

        Args:
            name: What it is called from now on.
            folder: What ``compress_delta`` wrote. It is not needed afterwards.

        Raises:
            ArtifactError: A delta of another base, or a damaged folder; the bank stays as it was.
            ValueError: The bank is closed, or has a delta of this name.
        """
        self._check_open()
        if name in self._tenants:
            raise ValueError(f"delta {name!r} is in the bank already; remove it first")
        rows = self._rows
        self._take_off()
        try:
            delta = fitted_delta(self.model, Path(folder), self._base)
            self._tenants[name] = _tenant(self.model, delta)
        finally:
            self._put_on(rows)

    def remove(self, name: str) -> None:
        """Forget a delta.

        Raises:
            ValueError: An unknown name, or a delta in use.
        """
        self._check_known(name)
        if name in _distinct(self._rows):
            raise ValueError(f"delta {name!r} is in use; use(None) first")
        del self._tenants[name]

    def nbytes(self, name: str) -> int:
        """Return the bytes that a delta holds in memory beside the base: all tensors of its own.

        Raises:
            ValueError: An unknown name.
        """
        self._check_known(name)
        return self._tenants[name].nbytes

    def use(self, rows: Name | Sequence[Name]) -> None:
        """Say whose delta the rows get from the next call of the model on.

        Args:
            rows: One name for all rows of any batch, None for the base alone; or a list with a name
                or None for each row of a batch.

        Raises:
            ArtifactError: Rows of their own where a module cannot tell them apart: in a mixture,
                whose experts see tokens of all rows, or where a delta changes tensors of a module
                that others lie in; nothing changes then.
            ValueError: An unknown name, no rows, or a closed bank.
        """
        self._check_open()
        wanted = rows if rows is None or isinstance(rows, str) else list(rows)
        if wanted == []:
            raise ValueError("rows: an empty list; name a delta or None for each row")
        for name in _distinct(wanted):
            self._check_known(name)
        if isinstance(wanted, list):
            self._check_separable(_distinct(wanted))
        self._take_off()
        self._put_on(wanted)

    def close(self) -> None:
        """Take everything off the model and forget the deltas.

        Raises:
            ArtifactError: A delta was merged into the model's weights.
        """
        if getattr(self.model, CARRIED, None) is self:
            self._take_off()
            self._tenants.clear()
            delattr(self.model, CARRIED)

    def _take_off(self) -> None:
        if isinstance(self._rows, str):
            self._tenants[self._rows].delta.check_in_place(self.model)
        self._swap.undo()
        self._rows = None

    def _put_on(self, rows: Name | list[Name]) -> None:
        try:
            if isinstance(rows, list):
                self._put_on_rows(rows)
            elif rows is not None:
                self._tenants[rows].delta.put_on(self.model, self._swap)
        except BaseException:
            self._swap.undo()
            raise
        self._rows = rows

    def _put_on_rows(self, names: list[Name]) -> None:
        tenants = {name: self._tenants[name] for name in _distinct(names)}
        shared = Rows(names)
        changed = dict.fromkeys(name for t in tenants.values() for name in (*t.deltas, *t.twins))
        for module in changed:
            deltas = {name: t.deltas[module] for name, t in tenants.items() if module in t.deltas}
            twins = {name: t.twins[module] for name, t in tenants.items() if module in t.twins}
            base = self.model.get_submodule(module)
            swap_module(self.model, module, PerRow(base, shared, deltas, twins), self._swap)
        for tenant in tenants.values():
            for owner, attribute, value in tenant.delta.sizes:
                if attribute == "vocab_size" and value > getattr(owner, attribute):
                    self._swap.set(owner, attribute, value)

    def _check_separable(self, names: list[str]) -> None:
        experts = (name for name, _ in self.model.named_modules() if expert_matrix(name))
        if (expert := next(experts, None)) is not None:
            raise ArtifactError(
                f"{expert}: an expert sees tokens of all rows together, so rows cannot have deltas "
                "of their own in a mixture; use one for all rows"
            )
        for name in names:
            if whole := self._tenants[name].whole:
                raise ArtifactError(
                    f"{name}: changes tensors of {whole[0]}, which holds other layers, so rows "
                    "cannot have deltas of their own; use one for all rows"
                )

    def _check_open(self) -> None:
        if getattr(self.model, CARRIED, None) is not self:
            raise ValueError("the bank is closed; make another one")

    def _check_known(self, name: str) -> None:
        if name not in self._tenants:
            near = difflib.get_close_matches(name, self._tenants, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self._tenants) or "none"
            raise ValueError(f"delta {name!r} is unknown; {hint}known are {known}")


def _distinct(rows: Name | Sequence[Name]) -> list[str]:
    names = [rows] if rows is None or isinstance(rows, str) else rows
    return [name for name in dict.fromkeys(names) if name is not None]


def _tenant(model: PreTrainedModel, delta: ModelDelta) -> _Tenant:
    """Build what rows of their own need: modules that share all but the tenant's tensors."""
    tenant = _Tenant(delta)
    tenant.deltas |= {name: adapted.delta for name, adapted in delta.layers.items()}
    for name, tensors in delta.tensors.items():
        module = model.get_submodule(name)
        if name in delta.layers and tensors.keys() == {"bias"}:
            old = getattr(module, "bias", None)
            shift = tensors["bias"].float() - (0 if old is None else old.detach().float())
            tenant.deltas[name] = _twin(tenant.deltas[name], {"bias": frozen(shift)})
        elif name in delta.layers or next(module.children(), None) is not None:
            tenant.whole.append(name)
        else:
            tenant.twins[name] = _twin(module, tensors)
    own = [t for layer in tenant.deltas.values() for t in layer.state_dict().values()]
    own += [t for tensors in delta.tensors.values() for t in tensors.values()]
    of_base = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes = {t.data_ptr(): t.nbytes for t in own if t.data_ptr() not in of_base}
    tenant.nbytes = sum(sizes.values())
    return tenant


def _twin(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that shares everything with another one except some tensors."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    for name, tensor in tensors.items():
        setattr(twin, name, tensor)
    return twin
