"""What is done to the gradients of a cohort before its optimiser sees them: projection, blocks, privacy of examples.

A gradient is `[clients, ...]` for the clients that still train. Projection is that of FedSLoP (arXiv 2604.24012),
blocks are the subspaces of FedKRSO (arXiv 2602.03019), and privacy of examples is DP-SGD (M. Abadi et al., 2016, arXiv
1607.00133) on what is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedraclora.seeding import derive_seed, generator


@dataclass(frozen=True)
class GradientRules:
    """The rules of one round.

    `projections` maps weights trained in full to the drawn factor on whose rows (a lora_a `[rank, in]`) or columns (a
    lora_b `[out, rank]`) their gradients are projected. Of `blocks` equal parts of the rank one trains at a time, for
    `block_steps` steps. `example_clip` bounds the norm of each example's gradient, and normal noise of
    `example_noise * example_clip` is added to their sum; 0 turns that off.
    """

    projections: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)
    blocks: int = 1
    block_steps: int = 1
    example_clip: float = 0.0
    example_noise: float = 0.0

    def project(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients with those of projected weights replaced by their projections."""
        return {key: self._projected(key, gradient) for key, gradient in gradients.items()}

    def _projected(self, key: str, gradient: Tensor) -> Tensor:
        if key not in self.projections:
            return gradient
        name, factor = self.projections[key]
        matrix = gradient.flatten(2)
        if name == "lora_a":
            projected = matrix @ pseudo_inverse(factor) @ factor
        else:
            projected = factor @ (pseudo_inverse(factor) @ matrix)
        return projected.view_as(gradient)

    def block_masks(self, seeds: Sequence[int], step: int, like: Tensor) -> Tensor:
        """Return `[clients, blocks]` zeros and, for the block that each client trains in this step, ones.

        Each client goes through the blocks in an order of its own, drawn from its seed.
        """
        mask = like.new_zeros(len(seeds), self.blocks)
        for row, seed in enumerate(seeds):
            order = generator(derive_seed(seed, "blocks")).permutation(self.blocks)
            mask[row, int(order[step // self.block_steps % self.blocks])] = 1
        return mask

    def keep_block(self, key: str, gradient: Tensor, mask: Tensor) -> Tensor:
        """Return the gradient of a factor with the blocks of its rank outside the mask set to zero."""
        axis = {"lora_a": 1, "lora_b": 2}.get(key.rpartition(".")[2])
        if axis is None:
            return gradient
        wide = mask.repeat_interleave(gradient.shape[axis] // self.blocks, dim=1)
        return gradient * (wide.unsqueeze(2) if axis == 1 else wide.unsqueeze(1))


def pseudo_inverse(factor: Tensor) -> Tensor:
    """Return the pseudo-inverse of a drawn factor, computed in float64."""
    inverse: Tensor = torch.linalg.pinv(factor.double())
    return inverse.to(factor)


def add_noise(gradients: Sequence[Tensor], deviation: float, generators: Sequence[np.random.Generator]) -> list[Tensor]:
    """Return the gradients `[clients, ...]` with normal noise from each client's own generator."""
    noisy = []
    for gradient in gradients:
        noise = np.stack([own.standard_normal(gradient.shape[1:]) for own in generators[: len(gradient)]])
        noisy.append(gradient + deviation * torch.from_numpy(noise).to(gradient))
    return noisy
