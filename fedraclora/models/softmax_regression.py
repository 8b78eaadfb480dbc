"""One linear layer on the flattened input: softmax regression for classes, linear regression for real targets."""

import math
from collections import OrderedDict
from dataclasses import dataclass

from torch import nn


@dataclass
class Config:
    """Settings of the linear model.

    bias: whether the layer adds a bias.
    """

    bias: bool = True


def build(config: Config, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the linear model; it maps inputs `[num, *input_shape]` to logits `[num, num_outputs]`."""
    fc1 = nn.Linear(math.prod(input_shape), num_outputs, bias=config.bias)
    return nn.Sequential(OrderedDict[str, nn.Module](flatten=nn.Flatten(), fc1=fc1))
