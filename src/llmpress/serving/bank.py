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
from llmpress.nn.layers.base import frozen
from llmpress.serving.rows import Name, PerRow, Rows

MOST_BATCHES = 8
"""Assignments of tenants to rows for which modules are kept; building takes longer than a step."""


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
        self._built: dict[tuple[Name, ...], dict[str, PerRow]] = {}  # the newest last
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
        self._built.clear()

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
                whose experts see tokens of all rows, or where a delta changes what the base's
                configuration computes or tensors of a module that others lie in; nothing changes
                then.
            ValueError: An unknown name, no rows, or a closed bank.
        """
        self._check_open()
        wanted = rows if rows is None or isinstance(rows, str) else list(rows)
        if wanted == []:
            raise ValueError("rows: an empty list; name a delta or None for each row")
        for name in _distinct(wanted):
            self._check_known(name)
        if isinstance(wanted, list):
            if wanted == self._rows:
                return
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
            self._built.clear()
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
        built = self._built.pop(tuple(names), {})
        shared = next(iter(built.values())).rows if built else Rows(names)
        changed = dict.fromkeys(name for t in tenants.values() for name in (*t.deltas, *t.twins))
        for module in changed:
            deltas = {name: t.deltas[module] for name, t in tenants.items() if module in t.deltas}
            twins = {name: t.twins[module] for name, t in tenants.items() if module in t.twins}
            base = self.model.get_submodule(module)
            if module not in built or built[module].base is not base:
                built[module] = PerRow(base, shared, deltas, twins)
            swap_module(self.model, module, built[module], self._swap)
        self._built[tuple(names)] = built
        while len(self._built) > MOST_BATCHES:
            self._built.pop(next(iter(self._built)))
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
            if changed := self._tenants[name].delta.computed:
                raise ArtifactError(
                    f"{name}: changes {', '.join(changed)} of the base's configuration, so rows "
                    "cannot have deltas of their own; use one for all rows"
                )
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
        if delta.computed:
            break  # it is never one of several
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
