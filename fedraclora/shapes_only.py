"""Computing with shapes alone: what a server would make of replies whose numbers nobody has.

Tensors on PyTorch's meta device have a shape and a type and no numbers, so that a model of any size costs nothing. Most
operations know what shape they give. Inside `shapes_only` those that would need numbers work, too: two tensors are
equal where they are the same one, a number taken out of a tensor is 1, and what lies on the CPU beside a tensor without
numbers loses its own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedraclora.sketch import digest

META = torch.device("meta")
Named = Mapping[str, Any] | None


class ShapesOnly(TorchFunctionMode):
    """While it is entered, tensors without numbers can be computed with like others."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Named = None
    ) -> Any:  # noqa: ANN401
        """Return what `func` gives, by shape alone where one of its arguments has no numbers."""
        kwargs = kwargs or {}
        if not _is_without_numbers(args):
            return func(*args, **kwargs)
        if func in _NUMBERS:
            return _NUMBERS[func]
        if func is torch.equal:
            return digest(args[0]) == digest(args[1])
        if func is Tensor.to:
            return func(args[0], *map(_type_alone, args[1:]), **_types_alone(kwargs))
        return func(*map(_without_numbers, args), **kwargs)


_NUMBERS: Mapping[Callable[..., Any], Any] = {Tensor.item: 1.0, Tensor.__float__: 1.0, Tensor.__bool__: True}


def _is_without_numbers(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, Tensor):
        return value.is_meta
    return isinstance(value, list | tuple) and any(map(_is_without_numbers, value))


def _without_numbers(value: Any) -> Any:  # noqa: ANN401
    """Return an argument with its tensors on the meta device."""
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_like(value, device=META)
    return type(value)(map(_without_numbers, value)) if type(value) in (list, tuple) else value


def _type_alone(value: Any) -> Any:  # noqa: ANN401
    """Return what says where a tensor is to go as its type alone: there are no numbers to move."""
    if isinstance(value, Tensor):
        return value.dtype
    return META if isinstance(value, str | torch.device) else value


def _types_alone(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _type_alone(value) for name, value in kwargs.items()}
