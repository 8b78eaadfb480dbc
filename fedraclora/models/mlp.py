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
    dropout: probability with which each output of a hidden layer is dropped while training, in [0, 1).
    """

    hidden: list[int] = field(default_factory=lambda: [200])
    bias: bool = True
    dropout: float = 0.0


def build(config: Config, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the perceptron; it maps inputs `[num, *input_shape]` to logits `[num, num_outputs]`.

    Raises ValueError for a hidden width below 1 and for a dropout outside [0, 1).
    """
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.dropout={config.dropout} must lie in [0, 1)")
    if any(width < 1 for width in config.hidden):
        raise ValueError(f"model.hidden={list(config.hidden)} holds a width below 1; give positive widths")
    widths = [math.prod(input_shape), *config.hidden, num_outputs]
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for depth, (width_in, width_out) in enumerate(pairwise(widths), start=1):
        layers[f"fc{depth}"] = nn.Linear(width_in, width_out, bias=config.bias)
        if depth < len(widths) - 1:
            layers[f"relu{depth}"] = nn.ReLU()
            if config.dropout > 0:
                layers[f"dropout{depth}"] = nn.Dropout(config.dropout)
    return nn.Sequential(layers)
