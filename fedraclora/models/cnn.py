"""Small convolutional network with group normalisation.

Group normalisation (Wu and He, Group Normalization, 2018, arXiv 1803.08494) has no running statistics, which clients
with different data could not share; batch normalisation is left out for that reason.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn


@dataclass
class Config:
    """Settings of the convolutional network.

    channels: output channels of each block of 3x3 convolution, group normalisation, ReLU and 2x2 max pooling.
    groups: number of channel groups that are normalised together; has to divide every entry of `channels`.
    hidden: width of the linear layer between the blocks and the output.
    """

    channels: list[int] = field(default_factory=lambda: [16, 32])
    groups: int = 4
    hidden: int = 64


def build(config: Config, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Return the network; it maps images `[num, channels, height, width]` or `[num, height, width]` to logits.

    Raises ValueError for flat inputs, images too small for the poolings, and groups that do not divide the channels.
    """
    channels_in, height, width = _image_shape(input_shape)
    _check(config, height=height, width=width)
    layers = OrderedDict[str, nn.Module]()
    if len(input_shape) == 2:
        layers["add_channel"] = nn.Unflatten(1, (1, height))
    for depth, (fan_in, fan_out) in enumerate(pairwise([channels_in, *config.channels]), start=1):
        layers[f"conv{depth}"] = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1)
        layers[f"norm{depth}"] = nn.GroupNorm(config.groups, fan_out)
        layers[f"relu{depth}"] = nn.ReLU()
        layers[f"pool{depth}"] = nn.MaxPool2d(2)
        height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(config.channels[-1] * height * width, config.hidden)
    layers[f"relu{len(config.channels) + 1}"] = nn.ReLU()
    layers["fc2"] = nn.Linear(config.hidden, num_outputs)
    return nn.Sequential(layers)


def _image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(input_shape) == 2:
        return 1, input_shape[0], input_shape[1]
    if len(input_shape) == 3:
        return input_shape[0], input_shape[1], input_shape[2]
    raise ValueError(
        f"model=cnn takes images [channels, height, width] or [height, width]; found inputs of shape "
        f"{list(input_shape)}: use a data set of images, or model=mlp"
    )


def _check(config: Config, *, height: int, width: int) -> None:
    channels = list(config.channels)
    if not channels or min(channels) < 1 or config.hidden < 1 or config.groups < 1:
        raise ValueError(
            f"model.channels={channels}, model.groups={config.groups}, model.hidden={config.hidden}: give at least one "
            "entry in channels, and positive numbers only"
        )
    indivisible = [channel for channel in channels if channel % config.groups]
    if indivisible:
        raise ValueError(f"model.groups={config.groups} has to divide every entry of model.channels; found {channels}")
    if min(height, width) < 2 ** len(channels):
        raise ValueError(
            f"{len(channels)} poolings need images of at least {2 ** len(channels)} pixels a side; found "
            f"{height} x {width}: give fewer model.channels"
        )
