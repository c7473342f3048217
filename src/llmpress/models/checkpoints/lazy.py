"""Tensors that are read when they are needed, and only as far as they are.

What transformers does to a stored tensor before a module has it (split, stack, transpose) is done
to these without reading anything: a slice of the result is read as slices of what it is made of.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Index = tuple[slice, ...]
"""One slice with start and stop for each dimension."""
Read = Callable[[Index], Tensor]

aten = torch.ops.aten


class LazyTensor(Tensor):
    """A tensor of known shape whose values are elsewhere.

    Splitting, selecting, stacking, concatenating and transposing give others that read no more than
    their part; of any other operation's result, all operands are read when it is.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        read: Returns a part of it.
    """

    _read: Read

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Read) -> Self:
        """Build one, on no device that matters."""
        tensor: Self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        tensor._read = read
        return tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Read) -> None: ...

    def read(self) -> Tensor:
        """Return the values, contiguous."""
        return self._read(_whole(self.shape)).contiguous()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub takes no defaults
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Find out the shapes of a result, and how a part of it is read."""
        del types
        kwargs = kwargs or {}
        shaped = func(*tree_map(_shape_alone, args), **tree_map(_shape_alone, kwargs))
        part = _PARTS.get(func)

        def result(number: int | None, like: Tensor) -> LazyTensor:
            if part is not None:
                return cls(like.shape, like.dtype, part(number, *args, **kwargs))

            def computed(index: Index) -> Tensor:
                values = func(*tree_map(_values, args), **tree_map(_values, kwargs))
                found: Tensor = values if number is None else values[number]
                return found[index]

            return cls(like.shape, like.dtype, computed)

        if isinstance(shaped, Tensor):
            return result(None, shaped)
        return type(shaped)(result(number, like) for number, like in enumerate(shaped))

    def __repr__(self) -> str:  # type: ignore[override]
        """Show what is known without reading."""
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


def _whole(shape: Sequence[int]) -> Index:
    return tuple(slice(0, size) for size in shape)


def _shape_alone(value: Any) -> Any:
    if not isinstance(value, LazyTensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _values(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _at(index: Index, dim: int, *put: slice) -> Index:
    """Put other slices in the place of one."""
    return (*index[:dim], *put, *index[dim + 1 :])


def _moved(tensor: LazyTensor, dim: int, offset: int, step: int = 1) -> Read:
    def read(index: Index) -> Tensor:
        start, stop = (offset + step * at for at in (index[dim].start, index[dim].stop))
        part = tensor._read(_at(index, dim, slice(start, max(start, stop - step + 1))))
        return part[_at(_whole(part.shape), dim, slice(None, None, step))] if step > 1 else part

    return read


def _slice(
    _: None,
    tensor: LazyTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Read:
    size = tensor.shape[dim]
    return _moved(tensor, dim % tensor.ndim, slice(start, end).indices(size)[0], step)


def _select(_: None, tensor: LazyTensor, dim: int, at: int) -> Read:
    dim %= tensor.ndim
    place = at % tensor.shape[dim]

    def read(index: Index) -> Tensor:
        one = slice(place, place + 1)
        return tensor._read((*index[:dim], one, *index[dim:])).squeeze(dim)

    return read


def _split(number: int, tensor: LazyTensor, sizes: int | Sequence[int], dim: int = 0) -> Read:
    if isinstance(sizes, int):
        return _moved(tensor, dim % tensor.ndim, number * sizes)
    return _moved(tensor, dim % tensor.ndim, sum(sizes[:number]))


def _unbind(number: int, tensor: LazyTensor, dim: int = 0) -> Read:
    return _select(None, tensor, dim, number)


def _squeeze(_: None, tensor: LazyTensor, dim: int) -> Read:
    return _select(None, tensor, dim, 0) if tensor.shape[dim] == 1 else tensor._read


def _stack(_: None, tensors: Sequence[LazyTensor], dim: int = 0) -> Read:
    dim %= tensors[0].ndim + 1

    def read(index: Index) -> Tensor:
        return torch.stack([t._read(_at(index, dim)) for t in tensors[index[dim]]], dim)

    return read


def _cat(_: None, tensors: Sequence[LazyTensor], dim: int = 0) -> Read:
    dim %= tensors[0].ndim
    ends = list(accumulate(tensor.shape[dim] for tensor in tensors))

    def parts(index: Index) -> Iterator[Tensor]:
        for tensor, end in zip(tensors, ends, strict=True):
            size = tensor.shape[dim]
            start, stop = (min(max(at - end + size, 0), size) for at in _ends(index[dim]))
            if start < stop:
                yield tensor._read(_at(index, dim, slice(start, stop)))

    def read(index: Index) -> Tensor:
        return torch.cat(list(parts(index)), dim)

    return read


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def _transpose(_: None, tensor: LazyTensor, one: int, other: int) -> Read:
    def read(index: Index) -> Tensor:
        order = list(index)
        order[one], order[other] = order[other], order[one]
        return tensor._read(tuple(order)).transpose(one, other)

    return read


def _same(_: None, tensor: LazyTensor, **__: Any) -> Read:
    return tensor._read


_PARTS: dict[Any, Callable[..., Read]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.squeeze.dim: _squeeze,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.transpose.int: _transpose,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
}
"""How a part of an operation's result is read: its number where there are several, its operands."""
