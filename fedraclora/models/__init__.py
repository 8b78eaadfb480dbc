"""Models, one plug-in a file: `build(config, *, input_shape, num_outputs)` returns a freshly initialised module."""

from types import ModuleType

import torch
from torch import nn

from fedraclora.data import Dataset


def initial_model(module: ModuleType, config: object, *, dataset: Dataset, seed: int) -> nn.Module:
    """Return the model that the plug-in `module` builds for `dataset`, with the weights that `seed` draws.

    The same seed gives the same bits. PyTorch's global generator is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed every accelerator
        model = module.build(config, input_shape=dataset.input_shape, num_outputs=dataset.num_outputs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{module.__name__}.build returned {type(model).__name__}; it has to return a torch.nn.Module")
    return model
