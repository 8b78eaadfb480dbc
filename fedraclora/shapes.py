"""A model as its shapes: modules on PyTorch's meta device, which have names and shapes and no numbers.

They serve to reckon what a model would cost that nobody has here, whatever its size. They cannot be run.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from fedraclora.plugins import nearest

META = torch.device("meta")
LAYERS, TENSORS, TARGETS = "layers", "tensors", "targets"
_LAYER_KEYS = {"out", "in", "bias", "kernel"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def module_of_shapes(description: Mapping[str, Any]) -> nn.Module:
    """Return a module on the meta device with the described layers and tensors, by their dotted names.

    `layers` maps names to `{out, in, bias: true, kernel: [height, width]}`: an `nn.Linear`, or with a kernel an
    `nn.Conv2d`. `tensors` maps the names of all other parameters to their shapes. `{0..11}` in a name stands for each
    of these numbers. `targets` is left to the reader. Raises ValueError for anything else, and for a name that is
    there twice.
    """
    known = (LAYERS, TENSORS, TARGETS)
    for key in description:
        if key not in known:  # a slip here would leave out all its tensors, and the forecast would be too low
            raise ValueError(f"a description of shapes has no {key!r}; {nearest(str(key), known)}")
    layers, tensors = _section(description, LAYERS), _section(description, TENSORS)
    if not layers:
        raise ValueError(f"a description of shapes needs {LAYERS!r}; found {sorted(description)}")
    root = nn.Module()
    for pattern, layer in layers.items():
        for name in expand(pattern):
            _put(root, name, _layer(name, layer))
    for pattern, shape in tensors.items():
        for name in expand(pattern):
            owner, _, attribute = name.rpartition(".")
            holder = _holder(root, owner)
            if hasattr(holder, attribute):
                raise ValueError(f"{name!r} is described twice")
            holder.register_parameter(attribute, nn.Parameter(torch.empty(_shape(name, shape, least=0), device=META)))
    return root


def _section(description: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = description.get(key) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{key!r} is {section!r}; expected a mapping from names")
    for name in section:
        if not isinstance(name, str):
            raise ValueError(f"{key!r} holds the name {name!r}, which is no text; put it in quotes")
    return section


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: `block.{0..2}.fc` for `block.0.fc` to `block.2.fc`."""
    parts = _RANGE.split(pattern)
    # The pattern has two groups, so that every third part is text.
    texts, ranges = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    numbers = [range(int(first), int(last) + 1) for first, last in ranges]
    if any(len(found) == 0 for found in numbers) or "{" in "".join(texts):
        raise ValueError(f"the name {pattern!r} holds a range that is none; write it as {{0..11}}")
    if not all(_RANGE.sub("0", pattern).split(".")):
        raise ValueError(f"the name {pattern!r} has an empty part; write it as block.0.fc")
    return [
        "".join(text + str(number) for text, number in zip(texts, (*chosen, ""), strict=True))
        for chosen in product(*numbers)
    ]


def _layer(name: str, layer: object) -> nn.Module:
    if not isinstance(layer, Mapping) or not {"out", "in"} <= layer.keys() <= _LAYER_KEYS:
        raise ValueError(f"layer {name!r} is {layer!r}; expected {{out: 768, in: 768}}, and bias or kernel where due")
    out, in_ = _shape(name, [layer["out"], layer["in"]])
    bias = layer.get("bias", False)
    if not isinstance(bias, bool):
        raise ValueError(f"layer {name!r} has the bias {bias!r}; expected true or false")
    if "kernel" not in layer:
        return nn.Linear(in_, out, bias=bias, device=META)
    kernel = _shape(name, layer["kernel"])
    if len(kernel) != 2:
        raise ValueError(f"layer {name!r} has the kernel {layer['kernel']!r}; expected [height, width]")
    return nn.Conv2d(in_, out, (kernel[0], kernel[1]), bias=bias, device=META)


def _shape(name: str, shape: object, *, least: int = 1) -> tuple[int, ...]:
    """Return a shape of at least so many dimensions; a single number of a model, such as CLIP's scale, has none."""
    is_list = isinstance(shape, Sequence) and not isinstance(shape, str)
    sizes = tuple(shape) if isinstance(shape, Sequence) and is_list else ()
    if not is_list or len(sizes) < least or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{name!r} has the shape {shape!r}; expected positive whole numbers")
    return sizes


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    holder = _holder(root, owner)
    if not child or hasattr(holder, child):
        raise ValueError(f"{name!r} is described twice, or has no name")
    holder.add_module(child, module)


def _holder(root: nn.Module, name: str) -> nn.Module:
    """Return the module of a dotted name, made where it is not there yet."""
    module = root
    for part in name.split(".") if name else []:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name!r} goes through {part!r}, which is a tensor")
    return module
