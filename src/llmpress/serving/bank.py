"""Many compressed deltas beside one base model in memory, one for all rows or one for each row.

Rows are the first dimension of what a module is given: ``x [rows, ..., features]``.
"""

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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


@dataclass
class _Tenant:
    """A delta and, by name of a module, what a row of this tenant has there.

    Attributes:
        delta: What `ModelDelta.put_on` puts on for all rows.
        deltas: What joins a linear's result.
        twins: What is used instead of the base's module.
        nbytes: Of all tensors that are not the base's.
        inseparable: Why rows cannot have this delta beside others; None where they can.
    """

    delta: ModelDelta
    deltas: dict[str, nn.Module] = field(default_factory=dict)
    twins: dict[str, nn.Module] = field(default_factory=dict)
    nbytes: int = 0
    inseparable: str | None = None


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
        self._whole: Name = None
        self._mounted = False  # rows of their own
        self._used: set[Name] = set()
        self._rows = Rows()
        self._built: dict[str, PerRow] = {}
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
        with self._bare():
            delta = fitted_delta(self.model, Path(folder), self._base)
            self._tenants[name] = _tenant(self.model, delta)

    def remove(self, name: str) -> None:
        """Forget a delta.

        Raises:
            ValueError: An unknown name, or a delta in use.
        """
        self._check_known(name)
        if name in self._used:
            raise ValueError(f"delta {name!r} is in use; use(None) first")
        with self._bare():
            del self._tenants[name]

    def nbytes(self, name: str) -> int:
        """Return the bytes that a delta holds in memory beside the base: all tensors of its own.

        Raises:
            ValueError: An unknown name.
        """
        self._check_known(name)
        return self._tenants[name].nbytes

    def vocabulary(self, name: Name) -> int:
        """Return how many tokens a delta's embeddings know, those of the base by None.

        Raises:
            ValueError: An unknown name.
        """
        if name is not None:
            self._check_known(name)
        found: Any = self.model.get_input_embeddings()
        place = next(place for place, module in self.model.named_modules() if module is found)
        base: Any = found.base if isinstance(found, PerRow) else found
        own = {} if name is None else self._tenants[name].delta.tensors.get(place, {})
        return len(own.get("weight", base.weight))

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
        if rows is not None and not isinstance(rows, str):
            if not rows:
                raise ValueError("rows: an empty list; name a delta or None for each row")
            self._mount(rows)
            self._rows.assign(rows)
            return
        self._check_open()
        if rows is not None:
            self._check_known(rows)
        self._take_off()
        if rows is not None:
            with self._undone_on_errors():
                self._tenants[rows].delta.put_on(self.model, self._swap)
            self._whole, self._used = rows, {rows}

    def use_packed(self, tokens: Sequence[Name], heads: Sequence[Name]) -> None:
        """Say whose delta each token of a packed batch gets, as `use` does for rows.

        A packed batch is ``[1, tokens, ...]``, sequences one after the other without padding, as
        transformers' continuous batching computes them.

        Args:
            tokens: A name, or None for the base, for each token.
            heads: The same for each token that the model's head is applied to.

        Raises:
            ArtifactError: As `use`.
            ValueError: As `use`.
        """
        self._mount(tokens)
        self._rows.assign_packed(tokens, heads)

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
        if self._whole is not None:
            self._tenants[self._whole].delta.check_in_place(self.model)
        self._swap.undo()
        self._whole, self._mounted, self._used = None, False, set()

    def _mount(self, names: Sequence[Name]) -> None:
        """Let the model ask whose its rows are, after checking these tenants."""
        self._check_open()
        used = set(names)
        if not self._mounted or not used <= self._used:
            for name in used:
                if name is None:
                    continue
                self._check_known(name)
                if reason := self._tenants[name].inseparable:
                    raise ArtifactError(f"{name}: {reason}; use one delta for all rows")
        if not self._mounted:
            self._take_off()
            with self._undone_on_errors():
                self._put_on_rows()
        self._used = used

    def _put_on_rows(self) -> None:
        """Put a module for rows of any tenants in the place of each that some tenant changes."""
        tenants = {name: t for name, t in self._tenants.items() if t.inseparable is None}
        self._rows.number(tenants)
        head = self.model.get_output_embeddings()
        for module in dict.fromkeys(m for t in tenants.values() for m in (*t.deltas, *t.twins)):
            base = self.model.get_submodule(module)
            if module not in self._built or self._built[module].base is not base:
                deltas = {n: t.deltas[module] for n, t in tenants.items() if module in t.deltas}
                twins = {n: t.twins[module] for n, t in tenants.items() if module in t.twins}
                built = PerRow(base, self._rows, deltas, twins, is_head=base is head)
                self._built[module] = built
            swap_module(self.model, module, self._built[module], self._swap)
        for tenant in tenants.values():
            for owner, attribute, value in tenant.delta.sizes:
                if attribute == "vocab_size" and value > getattr(owner, attribute):
                    self._swap.set(owner, attribute, value)
        self._mounted = True

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Take everything off while the tenants change, and put it on again."""
        whole, mounted, used = self._whole, self._mounted, self._used
        self._take_off()
        try:
            yield
            self._built.clear()
        finally:
            if whole is not None:
                self.use(whole)
            elif mounted:
                with self._undone_on_errors():
                    self._put_on_rows()
                self._used = used

    @contextmanager
    def _undone_on_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._swap.undo()
            raise

    def _check_open(self) -> None:
        if getattr(self.model, CARRIED, None) is not self:
            raise ValueError("the bank is closed; make another one")

    def _check_known(self, name: str) -> None:
        if name not in self._tenants:
            near = difflib.get_close_matches(name, self._tenants, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self._tenants) or "none"
            raise ValueError(f"delta {name!r} is unknown; {hint}known are {known}")


def _tenant(model: PreTrainedModel, delta: ModelDelta) -> _Tenant:
    """Build what rows of their own need: modules that share all but the tenant's tensors."""
    tenant = _Tenant(delta)
    if delta.computed:
        changed = ", ".join(delta.computed)
        tenant.inseparable = f"changes {changed} of the base's configuration"
    experts = (name for name, _ in model.named_modules() if expert_matrix(name))
    if (expert := next(experts, None)) is not None:
        tenant.inseparable = f"{expert} is an expert, which sees tokens of all rows together"
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
            reason = f"changes tensors of {name}, which holds other layers"
            tenant.inseparable = tenant.inseparable or reason
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
