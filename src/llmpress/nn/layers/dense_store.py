"""Dense weights of compressed layers that are kept between calls, up to a limit of bytes.

Where no kernel computes from packed weights, on a CPU, a layer has to unpack its weight for every
call. With a store it does so once, as long as there is room. A layer that finds none unpacks again:
nothing is evicted, since layers are called in turn and every one of them would have been evicted by
the time it is called again. Weights are kept in the order that products on a CPU want them in.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmpress.core.environment import available_memory_bytes
from llmpress.core.errors import ConfigError
from llmpress.nn.layers.blocked import stored_bytes

LIMIT = "LLMPRESS_DENSE_BYTES"
"""Environment variable with the limit of each model, in bytes; 0 to keep nothing."""

DENSE = "dense"
"""The form of a weight that is a weight: ``[out, in]``, or thin factors of it."""
Weights = tuple[Tensor, ...]


class _Kept(NamedTuple):
    dtype: torch.dtype
    state: "State"
    weights: Weights
    nbytes: int


_NONE: dict[str, _Kept] = {}


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
            self._limit = available_memory_bytes() // 2
        return self._limit

    @property
    def held(self) -> int:
        """Bytes that are kept."""
        return sum(kept.nbytes for forms in self._kept.values() for kept in forms.values())

    def find(
        self, layer: Any, form: str, changing: Sequence[Tensor], dtype: torch.dtype
    ) -> Weights | None:
        """Return what is kept of a layer, if nothing has changed since.

        Args:
            layer: Whose weights.
            form: In which they are needed; a layer may have several.
            changing: The tensors whose change makes them stale.
            dtype: In which they are needed.
        """
        kept = self._kept.get(layer, _NONE).get(form)
        if kept is not None and kept.dtype is dtype and kept.state.is_of(changing):
            return kept.weights
        return None

    def has_room(self, layer: Any, form: str, nbytes: int) -> bool:
        """Whether so many bytes may be kept of a layer, in the place of what is kept now."""
        old = self._kept.get(layer, _NONE).get(form)
        return self.held - (old.nbytes if old is not None else 0) + nbytes <= self.limit

    def make(
        self,
        layer: Any,
        form: str,
        changing: Sequence[Tensor],
        dtype: torch.dtype,
        build: Callable[[], Weights],
    ) -> Weights:
        """Return what ``build`` makes, and keep it if there is room; the rest as in `find`."""
        forms = self._kept.setdefault(layer, {})
        forms.pop(form, None)
        with torch.inference_mode(mode=False), torch.no_grad():  # so that gradients may pass later
            state, weights = State(changing), build()
        nbytes = sum(map(stored_bytes, weights))
        if self.held + nbytes <= self.limit:
            forms[form] = _Kept(dtype, state, weights, nbytes)
        return weights

    def drop(self, layer: Any) -> None:
        """Forget what is kept of a layer."""
        self._kept.pop(layer, None)

    def __reduce__(self) -> tuple[type["DenseStore"], tuple[int | None]]:
        """Make of a copy, in memory, in a file or in another process, an empty one."""
        return DenseStore, (self._limit,)


class State:
    """What tensors are at this moment.

    It holds on to their memory, lest others come to lie at the same address.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._memory = [tensor.detach() for tensor in tensors]
        self._counted = not any(tensor.is_inference() for tensor in tensors)
        self._addresses = list(map(_address, tensors))
        self._versions = self._versions_of(tensors)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, neither replaced nor changed in place since.

        Of tensors made in inference mode, which count no changes, the second is not noticed.
        """
        same = list(map(_address, tensors)) == self._addresses
        return same and self._versions_of(tensors) == self._versions

    def _versions_of(self, tensors: Sequence[Tensor]) -> list[int]:
        return list(map(_version, tensors)) if self._counted else []


_address, _version = Tensor.data_ptr, attrgetter("_version")


def _limit_of_environment() -> int | None:
    told = os.environ.get(LIMIT)
    if told is None:
        return None
    if not told.isdecimal():
        raise ConfigError(f"{LIMIT}={told}: give a number of bytes, 0 to keep no dense weights")
    return int(told)
