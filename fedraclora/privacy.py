"""Differential privacy of what the clients send: clipping, noise, and a clip that follows the updates' norms.

Client level (McMahan et al., "Learning Differentially Private Recurrent Language Models", 2018, arXiv 1710.06963):
each client's whole update is scaled to norm C at most, and normal noise of standard deviation z C on their sum hides
any one of them. The number of clients K is public and the sum is divided by it even where some did not answer, so
that neighbouring inputs differ in one client's contribution, any one in the ball of radius C, none at all being the
zero in it. Replacing it moves the sum by up to 2 C: the sensitivity is 2 C, not C, and `experiments.accountant` counts
it so. Adaptive clipping is that of Andrew et al., "Differentially Private Learning with Adaptive Clipping", 2021,
arXiv 1905.03871.

At the example level the contributions are the gradients of a batch's examples, clipped by
`fedraclora.optim.clip_by_client`; the settings are the same.

The guarantee covers what passes through here and nothing that is published beside it: training losses, numbers of
examples, or whether a round counted. What is left out: attacks on the rounding of floating-point noise (Mironov, 2012,
doi 10.1145/2382196.2382264).
"""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedraclora import seeding

LEVELS = ("client", "example")
# How far a norm may exceed the clip by the rounding of its own computation.
_NORM_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Privacy:
    """What is hidden, and by how much noise.

    `level` is whose data one contribution holds: a `client`'s or an `example`'s. `clip` is the bound C on a
    contribution's Euclidean norm, at the start where it is adaptive. `noise` is the multiplier z: the noise on the sum
    of clipped contributions has the standard deviation z C; 0 is no privacy. `delta` is that of (epsilon, delta).

    With `adaptive` the clip moves towards the `quantile` of the clients' norms at the rate `clip_lr`, and `count_noise`
    is the standard deviation of the noise on the number of clients within the clip; the paper takes a 20th of the
    cohort. Together the two noises then give what `noise` alone would.

    Raises ValueError for values out of range, for a clip that adapts to single examples, and for a count noise too
    small for any noise on the updates to give the privacy asked for.
    """

    level: str
    clip: float
    noise: float
    delta: float
    adaptive: bool = False
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that give no privacy or no meaning."""
        if self.level not in LEVELS:
            raise ValueError(f"level={self.level!r} is unknown; valid: {', '.join(LEVELS)}")
        for name in ("clip", "clip_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        for name in ("noise", "count_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and finite")
        if not 0 < self.delta < 1 or not 0 <= self.quantile <= 1:
            raise ValueError(f"delta={self.delta} must lie between 0 and 1, quantile={self.quantile} in [0, 1]")
        if self.adaptive:
            self._check_adaptive()

    def _check_adaptive(self) -> None:
        if self.level != "client":
            raise ValueError(f"the clip adapts to the norms of clients; with level={self.level!r} it must be fixed")
        if self.noise > 0 and self.count_noise <= self.noise / 2:
            raise ValueError(
                f"count_noise={self.count_noise} must exceed noise / 2 = {self.noise / 2}: the count alone gives away "
                f"more than noise={self.noise} allows; a 20th of the cohort is usual, so a small one needs less noise"
            )

    @property
    def update_noise(self) -> float:
        """Return the noise multiplier of the sum of updates, larger than `noise` where the clip adapts.

        Theorem 1 of the paper: z_update = (z^-2 - (2 sigma_b)^-2)^(-1/2). A client's pair of its update, over
        z_update C, and its place in the count (within or not, less 1/2), over sigma_b, has norm at most
        (z_update^-2 + (2 sigma_b)^-2)^(1/2) = 1 / z, as an update alone has under noise z. Replacing the client moves
        the sum of pairs by up to 2 / z.
        """
        if not self.adaptive or self.noise == 0:
            return self.noise
        ratio = self.noise / (2 * self.count_noise)
        return self.noise / math.sqrt((1 - ratio) * (1 + ratio))  # the difference of squares may cancel to 0


def noise_generator(seed: int | None) -> np.random.Generator:
    """Return the generator of a privacy noise: keyed by the operating system's entropy for None, else by `seed`.

    A seed is for simulation only: who knows it can subtract the noise. It lies in [0, 2^128). The generator is Philox,
    which is no cryptographic one.
    """
    return seeding.generator(secrets.randbits(128) if seed is None else seed)


def clip_to(tensors: Sequence[Tensor], clip: float) -> tuple[list[Tensor], bool]:
    """Return one client's tensors scaled by min(1, clip / norm), and whether their norm was within the clip.

    The norm is the Euclidean one of all tensors together, in float64. The dtypes stay; rounding to them does not lift
    the norm above the clip again. Tensors within the clip are not copied. Raises ValueError for a clip that is not
    positive, and for a norm that is not finite, which no factor makes small.
    """
    if not clip > 0:
        raise ValueError(f"clip={clip} must be positive")
    norm = _norm(tensors)
    if not math.isfinite(norm):
        raise ValueError(f"the norm of an update is {norm}; only finite ones can be clipped")
    if norm <= clip:
        return [tensor.detach() for tensor in tensors], True
    factor = clip / norm / (1 + max(torch.finfo(tensor.dtype).eps for tensor in tensors))
    return [(tensor.detach().double() * factor).to(tensor.dtype) for tensor in tensors], False


def noisy_mean(
    clipped: Mapping[int, Sequence[Tensor]],
    privacy: Privacy,
    *,
    clip: float,
    cohort_size: int,
    generator: np.random.Generator,
) -> list[Tensor]:
    """Return (sum of the clients' clipped tensors + N(0, (z clip)^2 I)) / `cohort_size`, position by position.

    `clip` is this round's and z is `privacy.update_noise`. `cohort_size` is the number of clients that were asked, and
    the noise does not depend on how many of them sent something: a client that failed is a zero update, and does not
    void the round. Sums and noise are in float64 and clients are added in the order of their numbers; the result has
    the dtypes and devices of the first one's tensors. Raises ValueError for no client (pass zeros for one where all
    failed), for more of them than `cohort_size`, for tensors unlike the first client's, and for an update whose norm
    exceeds `clip`, which would break the guarantee.
    """
    if not 1 <= len(clipped) <= cohort_size:
        raise ValueError(f"{len(clipped)} clients sent something; it must be 1 to cohort_size={cohort_size}")
    first = clipped[min(clipped)]
    sums = [torch.zeros_like(tensor, dtype=torch.float64, requires_grad=False) for tensor in first]
    for client in sorted(clipped):
        _add_clipped_(sums, client, clipped[client], clip)
    std = privacy.update_noise * clip
    for total in sums:
        total.add_(torch.from_numpy(generator.normal(0.0, std, size=tuple(total.shape))).to(total.device))
    return [(total / cohort_size).to(tensor.dtype) for total, tensor in zip(sums, first, strict=True)]


def noisy_share(
    within: Collection[bool], privacy: Privacy, *, cohort_size: int, generator: np.random.Generator
) -> float:
    """Return the noisy share of a cohort whose updates were within the clip, given that of each client that answered.

    The share of the paper's Algorithm 1, (count + N(0, count_noise^2)) / `cohort_size`; noise may take it out of
    [0, 1]. Differs from the paper: a client that did not answer counts as `quantile`, which leaves the clip where it
    is; it is in [0, 1] as the others' answers are, so that replacing a client moves the count by 1 at most. Raises
    ValueError for more clients than `cohort_size`.
    """
    if cohort_size < 1 or len(within) > cohort_size:
        raise ValueError(f"{len(within)} clients answered; it must be at most cohort_size={cohort_size}, at least 1")
    count = sum(within) + privacy.quantile * (cohort_size - len(within))
    return float(count + generator.normal(0.0, privacy.count_noise)) / cohort_size


def next_clip(clip: float, share_within: float, privacy: Privacy) -> float:
    """Return the next round's clip, C exp(-clip_lr (b - quantile)), given the noisy share b within this round's C."""
    return clip * math.exp(-privacy.clip_lr * (share_within - privacy.quantile))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def _add_clipped_(sums: Sequence[Tensor], client: int, tensors: Sequence[Tensor], clip: float) -> None:
    found, expected = ([list(tensor.shape) for tensor in group] for group in (tensors, sums))
    if found != expected:
        raise ValueError(f"client {client} sent tensors of shapes {found}, expected {expected} as from the first")
    norm = _norm(tensors)
    if not norm <= clip * (1 + _NORM_TOLERANCE):
        raise ValueError(
            f"the update of client {client} has norm {norm}, more than the clip {clip}; pass it to clip_to"
        )
    for total, tensor in zip(sums, tensors, strict=True):
        total.add_(tensor.detach().to(total))
