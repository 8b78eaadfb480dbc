"""Optimisers on stacked tensors: SGD, momentum and AdamW, whose every reduction stays inside one client.

The formulas are those of `torch.optim.SGD` and `torch.optim.AdamW` (Loshchilov and Hutter, 2019, arXiv 1711.05101).
They are written out because a stock optimiser would also move the clients that have finished, and clip all of them by
one common norm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedraclora.local_config import LocalConfig

BETAS = (0.9, 0.999)
EPSILON = 1e-8
CLIP_EPSILON = 1e-6

Keep = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Moments:
    """A client's moments by key, and over how many steps they were gathered (Adam's bias correction needs it).

    `tensors` are the first moments; without `second` ones, those start anew.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0
    second: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """What one client brings to its cohort.

    `moments` to go on from, `own` tensors in place of the shared ones that training starts from, `lr_scale` on the
    learning rate, and by key a `correction` that is added to each of its gradients.
    """

    moments: Moments | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    lr_scale: float = 1.0
    correction: Mapping[str, Tensor] = field(default_factory=dict)


class CohortOptimizer:
    """Moves the stacked tensors of a chunk; `values` maps keys to `[clients, ...]`."""

    def __init__(self, config: LocalConfig, start: Mapping[str, Tensor], members: Sequence[Member]) -> None:
        moments = [member.moments for member in members]
        self.config = config
        self.values = {
            key: _stack(tensor, [member.own.get(key) for member in members]) for key, tensor in start.items()
        }
        self._start = {key: values.clone() for key, values in self.values.items()} if config.proximal > 0 else {}
        found = [Moments() if item is None else item for item in moments]
        self._first = self._stack([item.tensors for item in found]) if self._has_first_moment else {}
        self._second = self._stack([item.second for item in found]) if self._is_adam else {}
        self._earlier_steps = torch.tensor([item.num_steps for item in found])
        self._earlier_second_steps = torch.tensor([item.num_steps if item.second else 0 for item in found])
        self._keeps_second = any(item.second for item in found)
        self._corrections = {
            key: torch.stack([member.correction.get(key, torch.zeros_like(start[key])) for member in members])
            for key in dict.fromkeys(key for member in members for key in member.correction)
        }
        scales = [member.lr_scale for member in members]
        self._lr_scales = None if all(scale == 1 for scale in scales) else torch.tensor(scales)
        self._num_steps = 0
        self._leaves: dict[str, Tensor] = {}

    @property
    def _is_adam(self) -> bool:
        return self.config.optimizer == "adamw"

    @property
    def _has_first_moment(self) -> bool:
        return self._is_adam or self.config.momentum > 0

    def _stack(self, moments: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        stacked = {key: torch.zeros_like(values) for key, values in self.values.items()}
        for client, earlier in enumerate(moments):
            for key, tensor in earlier.items():
                stacked[key][client] = tensor
        return stacked

    def live_leaves(self, live: int) -> dict[str, Tensor]:
        """Return the first `live` clients' tensors as leaves of the next graphs; they share memory with `values`."""
        self._leaves = {key: values[:live].detach().requires_grad_() for key, values in self.values.items()}
        return self._leaves

    def moments_of(self, client: int, num_steps: int) -> Moments:
        """Return the moments of one client after `num_steps` steps of this round; empty for plain SGD."""
        first, second = ({key: t[client] for key, t in stacked.items()} for stacked in (self._first, self._second))
        return Moments(first, int(self._earlier_steps[client]) + num_steps if first else 0, second)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], keep: Keep | None = None) -> None:
        """Take one step on the live clients, given the gradients of the live leaves by key.

        `keep` has the last word on what may move: it zeroes the rest of a gradient.
        """
        self._num_steps += 1
        final = {key: self._corrected(key, gradients[key], leaf) for key, leaf in self._leaves.items()}
        if keep is not None:
            final = {key: keep(key, gradient) for key, gradient in final.items()}
        if self.config.clip_norm > 0:
            final = dict(zip(final, clip_by_client(list(final.values()), self.config.clip_norm), strict=True))
        for key, leaf in self._leaves.items():
            if self._is_adam:
                self._adamw_(key, leaf, final[key])
            else:
                self._sgd_(key, leaf, final[key])

    def _corrected(self, key: str, gradient: Tensor, leaf: Tensor) -> Tensor:
        if key in self._corrections:
            gradient = gradient + self._corrections[key][: len(leaf)]
        if self.config.proximal > 0:
            gradient = gradient + self.config.proximal * (leaf - self._start[key][: len(leaf)])
        return gradient

    def _scaled(self, step: Tensor) -> Tensor:
        """Return a step with each client's own factor on the learning rate."""
        if self._lr_scales is None:
            return step
        return step * self._lr_scales[: len(step)].to(step).view(-1, *[1] * (step.ndim - 1))

    def _sgd_(self, key: str, leaf: Tensor, gradient: Tensor) -> None:
        if self.config.weight_decay > 0:
            gradient = gradient + self.config.weight_decay * leaf
        if self.config.momentum > 0:
            gradient = self._first[key][: len(leaf)].mul_(self.config.momentum).add_(gradient)
        leaf.add_(self._scaled(gradient), alpha=-self.config.lr)

    def _adamw_(self, key: str, leaf: Tensor, gradient: Tensor) -> None:
        beta1, beta2 = BETAS
        first, second = self._first[key][: len(leaf)], self._second[key][: len(leaf)]
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # First moments may have been gathered over earlier rounds too, and second ones where they are kept.
        gathered = (self._earlier_steps[: len(leaf)] + self._num_steps).to(leaf)
        step_size = (self.config.lr / (1 - beta1**gathered)).view(-1, *[1] * (leaf.ndim - 1))
        spread = second.sqrt().div_(self._second_correction(leaf)).add_(EPSILON)
        if self.config.weight_decay > 0:
            leaf.sub_(self._scaled(leaf * (self.config.lr * self.config.weight_decay)))
        leaf.sub_(self._scaled(step_size * first / spread))

    def _second_correction(self, leaf: Tensor) -> Tensor | float:
        """Return the root of the share of the second moments that has been gathered."""
        _, beta2 = BETAS
        if not self._keeps_second:
            return float((1 - beta2**self._num_steps) ** 0.5)
        # In float64: in float32 the first steps' small difference to 1 would lose half its digits.
        gathered = (self._earlier_second_steps[: len(leaf)] + self._num_steps).double()
        return (1 - beta2**gathered).sqrt().to(leaf).view(-1, *[1] * (leaf.ndim - 1))


def _stack(tensor: Tensor, own: Sequence[Tensor | None]) -> Tensor:
    """Return each client's own tensor, or else a copy of `tensor`, as `[clients, ...]`."""
    stacked = _stack_copies(tensor, len(own))
    for row, value in enumerate(own):
        if value is not None:
            stacked[row] = value
    return stacked


def _stack_copies(tensor: Tensor, clients: int) -> Tensor:
    """Return `tensor` once for each client, `[clients, ...]`, a matrix with its longer axis contiguous in memory.

    Of the products with a stacked factor `[clients, out, rank]`, those that read along `rank` are several times slower.
    """
    if tensor.ndim == 2 and tensor.shape[0] > tensor.shape[1]:
        return tensor.t().repeat(clients, 1, 1).transpose(1, 2)
    return tensor.repeat(clients, *[1] * tensor.ndim)


def clip_by_client(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Return the gradients `[clients, ...]` with each client's whole one scaled down to norm `max_norm` at most."""
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (max_norm / (norms + CLIP_EPSILON)).clamp(max=1.0)
    return [gradient * factors.view(-1, *[1] * (gradient.ndim - 1)) for gradient in gradients]
