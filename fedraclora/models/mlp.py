"""Multi-layer perceptron with ReLU activations; its linear layers are named fc1, fc2, ... from input to output."""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn


@dataclass
class Config:
    """Settings of the perceptron.

    hidden: width of each hidden layer, from input to output; none gives a linear model.
    bias: whether the linear layers add a bias.
    """

    hidden: list[int] = field(default_factory=lambda: [200])
    bias: bool = True


def build(config: Config, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the perceptron; it maps inputs `[num, *input_shape]` to logits `[num, num_outputs]`.

    Raises ValueError for a hidden width below 1.
    """
    if any(width < 1 for width in config.hidden):
        raise ValueError(f"model.hidden={list(config.hidden)} holds a width below 1; give positive widths")
    widths = [math.prod(input_shape), *config.hidden, num_outputs]
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for depth, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        layers[f"fc{depth}"] = nn.Linear(width_in, width_out, bias=config.bias)
        if depth < len(widths) - 1:
            layers[f"relu{depth}"] = nn.ReLU()
    return nn.Sequential(layers)
