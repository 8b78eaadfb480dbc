"""Models, one plug-in a file: `build(config, *, input_shape, num_outputs)` returns a freshly initialised module."""

from types import ModuleType

import torch
from torch import nn


def initial_model(
    module: ModuleType, config: object, *, input_shape: tuple[int, ...], num_outputs: int, seed: int
) -> nn.Module:
    """Return the model of the plug-in `module` for such inputs and outputs, with the weights that `seed` draws.

    The same seed gives the same bits. PyTorch's global generator is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every accelerator
        model = module.build(config, input_shape=input_shape, num_outputs=num_outputs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{module.__name__}.build returned {type(model).__name__}; it has to return a torch.nn.Module")
    return model
