"""Dense weights of compressed layers that are kept between calls, up to a limit of bytes.

Where no kernel computes from packed weights, on a CPU, a layer has to unpack its weight for every
call. With a store it does so once, as long as there is room. A layer that finds none unpacks again:
nothing is evicted, since layers are called in turn and every one of them would have been evicted by
the time it is called again. Packed weights that torch wants in another order are kept here too.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch
from torch import Tensor

from llmpress.errors import ConfigError

LIMIT = "LLMPRESS_DENSE_BYTES"
"""Environment variable with the limit of each model, in bytes; 0 to keep nothing."""

Weights = tuple[Tensor, ...]


class _Kept(NamedTuple):
    dtype: torch.dtype
    state: "State"
    weights: Weights


class DenseStore:
    """What the layers of one model keep.

    Args:
        limit: Bytes; by default those of the environment, else half of the memory that is
            available at the first call.

    Raises:
        ConfigError: A limit in the environment that is no number of bytes.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = _limit_of_environment() if limit is None else limit
        self._kept: weakref.WeakKeyDictionary[Any, dict[str, _Kept]] = weakref.WeakKeyDictionary()

    @property
    def limit(self) -> int:
        """Bytes that may be kept."""
        if self._limit is None:
            self._limit = psutil.virtual_memory().available // 2
        return self._limit

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        forms = (kept for forms in self._kept.values() for kept in forms.values())
        return sum(t.nbytes for kept in forms for t in kept.weights)

    def keeps(self, layer: Any, form: str, nbytes: int) -> bool:
        """Whether weights of a layer in this form are kept, or would be."""
        return form in self._kept.get(layer, {}) or self.held + nbytes <= self.limit

    def weights(
        self,
        layer: Any,
        stored: Sequence[Tensor],
        dtype: torch.dtype,
        build: Callable[[], Weights],
        form: str = "dense",
    ) -> Weights:
        """Return what ``build`` makes, from an earlier call if nothing has changed since.

        Args:
            layer: Whose weights.
            stored: The tensors that they are made of.
            dtype: In which they are needed.
            build: Makes them.
            form: In which they are needed; a layer may have several.
        """
        forms = self._kept.setdefault(layer, {})
        kept = forms.get(form)
        if kept is not None and kept.dtype == dtype and kept.state.is_of(stored):
            return kept.weights
        forms.pop(form, None)
        with torch.inference_mode(mode=False), torch.no_grad():  # so that gradients may pass later
            made = build()
        if self.held + sum(t.nbytes for t in made) <= self.limit:
            forms[form] = _Kept(dtype, State(stored), made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "DenseStore":
        """Return an empty store of the same limit: for a copy of the model."""
        return DenseStore(self._limit)


class State:
    """What tensors are at this moment.

    It holds on to their memory, lest other values come to lie at the same address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._memory = [tensor.detach() for tensor in tensors]
        self._counted = not any(tensor.is_inference() for tensor in tensors)
        self._addresses = list(map(ADDRESS, tensors))
        self._versions = self._versions_of(tensors)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, neither replaced nor changed in place since.

        Of tensors made in inference mode, which count no changes, the second is not noticed.
        """
        # At every call of every layer: what takes longer is felt on a CPU.
        same = list(map(ADDRESS, tensors)) == self._addresses
        return same and self._versions_of(tensors) == self._versions

    def _versions_of(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(VERSION, tensors)) if self._counted else []


ADDRESS, VERSION = Tensor.data_ptr, attrgetter("_version")


def _limit_of_environment() -> int | None:
    told = os.environ.get(LIMIT)
    if told is None:
        return None
    if not told.isdecimal():
        raise ConfigError(f"{LIMIT}={told}: give a number of bytes, 0 to keep no dense weights")
    return int(told)
