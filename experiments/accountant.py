"""What a run has given away so far: its epsilon, by Renyi accounting of normal noise on samples of a fixed size.

Neighbouring inputs differ in one contribution of the N there are, replaced by any other (`REPLACE_ONE`; N is public).
A round draws K of the N uniformly, without replacement and anew, and releases the sum of the drawn contributions, each
of norm at most C, with noise N(0, (z C)^2 I).

Why the accountant is told a noise multiplier of z / 2: the bound for such samples (Wang, Balle and Kasiviswanathan,
"Subsampled Renyi Differential Privacy and Analytical Moments Accountant", 2019, arXiv 1808.00087, Theorem 27) takes the
Renyi divergence of the unsampled mechanism between neighbours, alpha / (2 m^2) for a noise of m sensitivities.
`dp_accounting` uses this formula for every neighbouring relation. A contribution v is replaced by v', and
|v - v'| <= 2 C, so that m = z C / (2 C) = z / 2. No smaller distance would do: with v = -v' and all others equal to v',
one input's release is a mixture of two normals 2 C apart and the other's is one of them. The usual figures for adding
or removing a client under Poisson sampling have m = z and are less than half as large, because they promise less.

The theorem's bound exceeds that of the whole population where nearly all are drawn. Which of them are drawn never tells
more than drawing all does (the Renyi divergence is quasi-convex), so the smaller of the two is taken.

Drawing lots hides only while the lots are secret: whoever knows which clients or examples were drawn, as from the root
seed, must count with all of them drawn in the rounds that held the contribution.
"""

import functools

import dp_accounting
import numpy as np
import numpy.typing as npt
from dp_accounting import rdp

# Integers to 63 with tenths below 11, then powers of 2 to 1024.
ORDERS: tuple[float, ...] = tuple(rdp.rdp_privacy_accountant.DEFAULT_RDP_ORDERS)


def client_epsilon(num_clients: int, cohort_size: int, noise: float, num_rounds: int, delta: float) -> float:
    """Return the epsilon of one client's whole data after `num_rounds` rounds.

    Each draws `cohort_size` of `num_clients` clients, weighs them alike, and adds noise of `noise` times the clip to
    the sum of their updates; with a clip that adapts this is `Privacy.noise`, which stands for both noises together.
    After no round the epsilon is 0, without noise it is infinite. Raises ValueError for values out of range.
    """
    if not 1 <= cohort_size <= num_clients:
        raise ValueError(f"cohort_size={cohort_size} must lie between 1 and num_clients={num_clients}")
    return _epsilon((num_clients, cohort_size), noise, num_rounds, delta)


def example_epsilon(num_examples: int, batch_size: int, noise: float, num_steps: int, delta: float) -> float:
    """Return the epsilon of one example of a client that took `num_steps` local steps in all its rounds together.

    Each step draws `batch_size` of the client's `num_examples` examples anew (all, where it has no more) and adds noise
    of `noise` times the clip to the sum of their gradients. Clients' examples are disjoint, so a run's epsilon is the
    largest of its clients', that of the fewest examples where all took as many steps. Otherwise as `client_epsilon`.
    """
    if min(num_examples, batch_size) < 1:
        raise ValueError(f"num_examples={num_examples} and batch_size={batch_size} must be at least 1")
    return _epsilon((num_examples, min(batch_size, num_examples)), noise, num_steps, delta)


def _epsilon(sampled: tuple[int, int], noise: float, count: int, delta: float) -> float:
    if not 0 <= noise < float("inf") or count < 0 or not 0 < delta < 1:
        raise ValueError(
            f"noise={noise} must be at least 0 and finite, the number of releases ({count}) at least 0, "
            f"delta={delta} between 0 and 1"
        )
    if count == 0:
        return 0.0
    if noise == 0:
        return float("inf")
    epsilon, _ = rdp.compute_epsilon(ORDERS, count * _renyi(sampled, noise), delta)
    return float(epsilon)


@functools.cache
def _renyi(sampled: tuple[int, int], noise: float) -> npt.NDArray[np.float64]:
    """Return a bound on the Renyi divergence of one release at each of the orders; `sampled` is (N, K).

    Divergences add up over releases, so that this slow part is needed once a run.
    """
    whole = dp_accounting.GaussianDpEvent(noise / 2)
    sample = dp_accounting.SampledWithoutReplacementDpEvent(*sampled, whole)
    divergences = np.minimum(_renyi_of(whole), _renyi_of(sample))
    divergences.setflags(write=False)
    return divergences


def _renyi_of(event: dp_accounting.DpEvent) -> npt.NDArray[np.float64]:
    accountant = rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event)
    # There is no public name for it; composing anew for every round would take a fifth of a second each time.
    return np.asarray(accountant._rdp)  # noqa: SLF001
