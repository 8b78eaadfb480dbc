"""Every method's rule in dense float64 NumPy, on a ReLU perceptron trained by SGD: what the project must agree with.

It shares no code with the project. One function a method, named like the method, takes a `Run` and the method's own
arguments and returns the final effective weights and the biases, a list each with one array a layer
(`fed_sa_lora` returns the averaged A and each client's own B instead, for there is no common model):

    weights, biases = oracle.flexlora(Run(...))
    weights, biases = oracle.fed_krso(Run(...), subspaces, orders, block_steps=2)

Options with a function of their own: `chain(run, side, length)` is RAC-LoRA with links of several rounds (0: one link
for good), `rac_lora_rows` averages each component over the clients that train it, `fed_sb_random` draws the factors.

A `Run` holds what all methods need; it is never changed, so one serves many methods. What is random comes from outside.
Rounds count from 1 and layers from 0. Where a method restarts every round, the link of a round is `round - 1`.

- `cohorts`: the clients of each round; `sizes[client]` are the examples that weigh it; `batches(round, client)` yields
  its local steps, pairs of inputs [num, n] and labels [num].
- `draw(link, layer, trained)` returns the drawn factor: B [m, r] where `trained` is "a", A [r, n] where it is "b" or
  "ab", m and n being the layer's outputs and inputs. What each method asks it for:
  rac_lora, bernoulli_lora: the link and side of each round; chain_of_lora: "ab" of each link; ffa_lora: "b" of link 0;
  flora (without `private`): "ab" of each round; fed_it, fedex_lora, flexlora, het_lora, ro_lora, fed_sa_lora,
  lora_fair: "ab" of link 0; fed_sb_random: "b" and "a" of link 0; fed_slop, sketched_full: "b" of each round;
  full, fed_sb, fr_lora, fed_krso: nothing.
- `private(link, layer, trained, client)` is the draw of one client alone (rac_lora, flora).
- `scale` is s = alpha / r. `ranks` and `scales` name the clients whose rank and scale differ (rac_lora, flora,
  flexlora, het_lora); such a client sees the first `ranks[client]` components of a factor.

Low-rank methods keep the biases as they are. "Dense" means that sums are of full matrices, W + sum p_k (W_k - W),
wherever the rule is one about products: no bookkeeping of factors can be wrong here and in the project alike. Factors
are averaged only where the rule says so. An SVD leaves signs open; they cancel in every product and stay so under SGD.

Differs from the papers, in all methods: clients are weighed by their examples (FedEx-LoRA, RoLoRA, Fed-SB, FedKRSO and
FedSLoP weigh them equally), the local optimiser is SGD, and the factors may be drawn from any law.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Layers = list[Matrix]
Factors = list[dict[str, Matrix]]  # a layer: its factors by name, in the order in which they are multiplied
Final = tuple[Layers, Layers]
Steps = Iterable[tuple[Matrix, NDArray[np.int64]]]
Draw = Callable[[int, int, str], Matrix]
PrivateDraw = Callable[[int, int, str, int], Matrix]


@dataclass(frozen=True)
class Run:
    """What a run is described by, whatever the method; the module's docstring explains the fields."""

    weights: Layers
    biases: Layers
    cohorts: Sequence[Sequence[int]]
    batches: Callable[[int, int], Steps]
    sizes: Mapping[int, int]
    lr: float
    scale: float
    draw: Draw
    ranks: Mapping[int, int] = field(default_factory=dict)
    scales: Mapping[int, float] = field(default_factory=dict)

    def rounds(self) -> Iterator[tuple[int, dict[int, float]]]:
        """Yield each round with the shares p_k of its clients, which sum to 1."""
        for round, cohort in enumerate(self.cohorts, start=1):
            total = sum(self.sizes[client] for client in cohort)
            yield round, {client: self.sizes[client] / total for client in cohort}

    def scale_of(self, client: int) -> float:
        return self.scales.get(client, self.scale)

    def start(self, link: int, trained: str) -> Factors:
        """Return each layer's pair at the beginning of a link: one factor drawn, the other zero."""
        return [pair(weight, self.draw(link, layer, trained), trained) for layer, weight in enumerate(self.weights)]

    def cut(self, client: int, factors: Factors) -> Factors:
        """Return the components that a client's rank leaves of each pair."""
        rank = self.ranks.get(client)
        return [{"b": layer["b"][:, :rank], "a": layer["a"][:rank]} for layer in factors]

    def view(self, client: int, factors: Factors) -> Factors:
        """Return the cut pair such that under the client's own scale it is what it is under the full one."""
        ratio = self.scale / self.scale_of(client)
        return [{"b": layer["b"] * ratio, "a": layer["a"]} for layer in self.cut(client, factors)]

    def train_factors(self, job: tuple[int, int], weights: Layers, factors: Factors, trained: Sequence[str]) -> Factors:
        """Take a client's steps on the factors of each layer that `trained` names, on top of fixed weights.

        With W + s F_1 .. F_n and G the gradient by that sum, F_i moves along s (F_1 .. F_{i-1})^T G (F_{i+1} .. F_n)^T.
        """
        scale = self.scale_of(job[1])
        for inputs, labels in self.batches(*job):
            gradients, _ = gradient(effective(weights, factors, scale), self.biases, inputs, labels)
            factors = [
                {
                    name: factor - self.lr * scale * slope(layer, name, by_weight) if name in names else factor
                    for name, factor in layer.items()
                }
                for layer, names, by_weight in zip(factors, trained, gradients, strict=True)
            ]
        return factors

    def train_weights(self, job: tuple[int, int], weights: Layers, change: Callable | None = None) -> Layers:
        """Take a client's steps on the full weights, the biases fixed; `change(step, layer, G)` replaces a gradient."""
        for step, (inputs, labels) in enumerate(self.batches(*job)):
            gradients, _ = gradient(weights, self.biases, inputs, labels)
            if change is not None:
                gradients = [change(step, layer, by_weight) for layer, by_weight in enumerate(gradients)]
            weights = [weight - self.lr * by_weight for weight, by_weight in zip(weights, gradients, strict=True)]
        return weights

    def train_pairs(self, round: int, shares: Iterable[int], weights: Layers, factors: Factors) -> dict[int, Factors]:
        """Return what each client of a round makes of a pair of which it trains both factors."""
        both = ["ab"] * len(weights)
        return {client: self.train_factors((round, client), weights, factors, both) for client in shares}


# Methods of one optimised rule: what is averaged are weights, biases and factors, nothing else.


def full(run: Run) -> Final:
    """FedAvg on all parameters (McMahan et al. 2017, arXiv 1602.05629)."""
    weights, biases = run.weights, run.biases
    for round, shares in run.rounds():
        start, whole = (weights + biases, None), [np.eye(weight.shape[1]) for weight in weights]
        ends = {client: descend(run, (round, client), start, whole, 0.0)[0] for client in shares}
        moved = mean(ends, shares)
        weights, biases = moved[: len(weights)], moved[len(weights) :]
    return weights, biases


def chain(run: Run, trained: str, length: int, drawn: str | None = None) -> Final:
    """Average the trained factors each round and merge them after `length` rounds (0: never).

    `drawn` says which factor the draw is for, where that is not the one that `trained` names: with "a" it is B.

    With ("b", 0) or ("a", 0) FFA-LoRA (Sun et al. 2024, arXiv 2403.12313), with ("ab", 0) FedIT (Zhang et al. 2023,
    arXiv 2305.05644), with "ab" the federated form of chain of LoRA (Xia, Qin, Hazan 2024, arXiv 2401.04151), with
    one side RAC-LoRA whose links span `length` rounds.
    """
    weights, factors, age, link = run.weights, run.start(0, drawn or trained), 0, 0
    for round, shares in run.rounds():
        sides = [trained] * len(weights)
        ends = {client: run.train_factors((round, client), weights, factors, sides) for client in shares}
        factors, age = mean_factors(ends, shares), age + 1
        if age == length:
            weights, age, link = effective(weights, factors, run.scale), 0, link + 1
            factors = run.start(link, drawn or trained)
    return effective(weights, factors, run.scale), run.biases


def ffa_lora(run: Run) -> Final:
    """FFA-LoRA: A stays as first drawn (Sun, Li, Li, Ding 2024, arXiv 2403.12313)."""
    return chain(run, "b", 0)


def fed_it(run: Run) -> Final:
    """FedIT: both factors are averaged, each by itself (Zhang et al. 2023, arXiv 2305.05644)."""
    return chain(run, "ab", 0)


def chain_of_lora(run: Run, length: int = 1) -> Final:
    """Chain of LoRA (Xia, Qin, Hazan 2024, arXiv 2401.04151): FedIT, merged every `length` rounds."""
    return chain(run, "ab", length)


# Methods that merge and restart every round: W + sum p_k (W_k - W), whatever the clients trained.


def restarted(run: Run, trained: Callable[[int, int], str], draw: PrivateDraw) -> Final:
    """Let each client train a pair that starts at zero every round, and average the clients' full weights."""
    weights = run.weights
    for round, shares in run.rounds():
        link, ends = round - 1, {}
        names = [trained(link, layer) for layer in range(len(weights))]
        for client in shares:
            drawn = [draw(link, layer, name, client) for layer, name in enumerate(names)]
            factors = run.cut(client, [pair(*layer) for layer in zip(weights, drawn, names, strict=True)])
            factors = run.train_factors((round, client), weights, factors, names)
            ends[client] = effective(weights, factors, run.scale_of(client))
        weights = mean(ends, shares)
    return weights, run.biases


def shared_draw(run: Run) -> PrivateDraw:
    return lambda link, layer, trained, _: run.draw(link, layer, trained)


def rac_lora(run: Run, side: str = "b", private: PrivateDraw | None = None) -> Final:
    """Fed-RAC-LoRA with links of one round (Malinovsky et al. 2024, arXiv 2410.08305).

    The factor of the other side is drawn afresh each link, by each client for itself with `private`. Longer links:
    `chain(run, side, length)`.
    """
    return restarted(run, lambda link, layer: side, private or shared_draw(run))


def bernoulli_lora(run: Run, sides: Callable[[int, int], str]) -> Final:
    """Bernoulli-LoRA: RAC-LoRA whose side `sides(link, layer)` falls by a coin.

    I. Sokolov, A. Sadiev, Y. Demidovich, F. S. Al-Qahtani, P. Richtarik 2025, arXiv 2508.03820. Differs from the paper:
    every layer has a coin of its own, and a link is several local steps of several clients, not one step.
    """
    return restarted(run, sides, shared_draw(run))


def flora(run: Run, private: PrivateDraw | None = None) -> Final:
    """FLoRA: stacked pairs are the sum of the clients' products (Z. Wang et al. 2024, arXiv 2409.05976).

    `private` draws each client's first A, as published; without it all clients start from a common one.
    """
    return restarted(run, lambda link, layer: "ab", private or shared_draw(run))


def rac_lora_rows(run: Run, side: str = "b") -> Final:
    """RAC-LoRA of clients of unlike ranks, each component averaged over the clients that train it."""
    weights = run.weights
    for round, shares in run.rounds():
        drawn, sides = run.start(round - 1, side), [side] * len(weights)
        ends = {k: run.train_factors((round, k), weights, run.cut(k, drawn), sides) for k in shares}
        steps = [np.zeros_like(weight) for weight in weights]
        for layer, start in enumerate(drawn):
            for j in range(start["a"].shape[0]):
                who = [client for client in shares if ends[client][layer]["a"].shape[0] > j]
                for client in who:
                    part = np.outer(ends[client][layer]["b"][:, j], ends[client][layer]["a"][j])
                    steps[layer] += shares[client] / sum(shares[k] for k in who) * run.scale_of(client) * part
        weights = [weight + step for weight, step in zip(weights, steps, strict=True)]
    return weights, run.biases


def sketched_full(run: Run) -> Final:
    """Clients train the weights in full and send their step's projection on the rows of a drawn A.

    The "sketched" kind of update of J. Konecny et al. 2016 (arXiv 1610.05492), with RAC-LoRA's sketch: what local
    training inside the subspace costs or gains against it is the difference of the two methods.
    """
    weights = run.weights
    for round, shares in run.rounds():
        ends = {client: run.train_weights((round, client), weights) for client in shares}
        projectors = [np.linalg.pinv(layer["a"]) @ layer["a"] for layer in run.start(round - 1, "b")]
        moved = zip(weights, mean(ends, shares), projectors, strict=True)
        weights = [weight + (end - weight) @ projector for weight, end, projector in moved]
    return weights, run.biases


def fed_krso(run: Run, subspaces: Callable[[int, int], Layers], orders: Callable, block_steps: int) -> Final:
    """FedKRSO: several random subspaces a round (Yang, Wu, Guo, Sun, Gong 2026, arXiv 2602.03019).

    `subspaces(link, layer)` returns A_1 .. A_S and `orders(round, client)` a permutation of range(S); the t-th local
    step is in block `order[(t // block_steps) % S]`. A step on B_j from the present point is the step s^2 G A_j^T A_j
    on the weights, so no accumulator is needed to say where a client ends, and the sum of all B_j A_j is W_k - W.

    Differs from the paper: a client goes through all seeds in an order of its own, where the paper draws the seed
    of each block anew from the set; there A is Gaussian with E[A^T A] = I, the scale 1, and the local optimiser Adam.
    """
    weights = run.weights
    for round, shares in run.rounds():
        blocks = [subspaces(round - 1, layer) for layer in range(len(weights))]
        ends = {}
        for client in shares:
            change = in_blocks(blocks, orders(round, client), block_steps, run.scale**2)
            ends[client] = run.train_weights((round, client), weights, change)
        weights = mean(ends, shares)
    return weights, run.biases


def in_blocks(blocks: Sequence[Layers], order: Sequence[int], block_steps: int, factor: float) -> Callable:
    """Return the change of a gradient into a step in the subspace of the block that the local step falls in."""

    def change(step: int, layer: int, by_weight: Matrix) -> Matrix:
        sketch = blocks[layer][order[step // block_steps % len(order)]]
        return factor * by_weight @ sketch.T @ sketch

    return change


def fed_slop(run: Run, momentum: float, *, carried: bool = True, upload: str = "delta") -> Final:
    """FedSLoP: momentum SGD on all parameters, each weight's gradient projected on the rows of the round's P.

    Y. He, Z. Huang, J. Geng 2026, arXiv 2604.24012. `carried` keeps a client's momentum from the last round in which
    it took part, so that its step leaves the rows of the new P. `upload` "factor" sends (W_k - W) P^T, which with
    `carried=False` and orthonormal rows loses nothing.

    Differs from the paper: it describes a momentum inside the subspace; carrying one of full shape is what the
    released MNIST experiment does. Sending a factor is an option of this project.
    """
    weights, biases, moments = run.weights, run.biases, {}
    for round, shares in run.rounds():
        rows = [layer["a"] for layer in run.start(round - 1, "b")]
        projectors, ends = [P.T @ P for P in rows], {}
        for client in shares:
            start = (weights + biases, moments.get(client) if carried else None)
            ends[client], moments[client] = descend(run, (round, client), start, projectors, momentum)
        moved = mean(ends, shares)
        biases = moved[len(weights) :]
        if upload == "factor":
            steps = zip(weights, moved, rows, strict=False)
            weights = [weight + (end - weight) @ P.T @ P for weight, end, P in steps]
        else:
            weights = moved[: len(weights)]
    return weights, biases


# Methods of one pair that is never closed: what the server makes of the clients' pairs.


def fedex_lora(run: Run, residual_rank: int | None = None) -> Final:
    """FedEx-LoRA: what the means of the factors miss of the mean product goes into the weights.

    R. Singhal, K. Ponkshe, P. Vepakomma 2024, arXiv 2410.09432, equations 12 to 18. With `residual_rank` the residual
    is replaced by its best approximation of that rank.
    """
    weights, factors = run.weights, run.start(0, "ab")
    for round, shares in run.rounds():
        ends = run.train_pairs(round, shares, weights, factors)
        ideal = mean({client: effective(weights, pairs, run.scale) for client, pairs in ends.items()}, shares)
        factors = mean_factors(ends, shares)
        missed = zip(ideal, effective(weights, factors, run.scale), strict=True)
        residuals = [best_approximation(exact - found, residual_rank) for exact, found in missed]
        weights = [weight + residual for weight, residual in zip(weights, residuals, strict=True)]
    return effective(weights, factors, run.scale), run.biases


def flexlora(run: Run) -> Final:
    """FlexLoRA: the mean product, factorised anew by an SVD (Bai, Chen, Qian, Yao, Li 2024, arXiv 2402.11505).

    Differs from the paper: products carry the clients' scales, singular values are shared evenly by both factors, and
    the server keeps as many components as its largest pair has, where the paper cuts the full product for each client.
    """
    factors = run.start(0, "ab")
    for round, shares in run.rounds():
        ends = trained_views(run, round, shares, factors)
        products = {k: [run.scale_of(k) * product(layer) for layer in pairs] for k, pairs in ends.items()}
        ranks = [layer["a"].shape[0] for layer in factors]
        steps = zip(mean(products, shares), ranks, strict=True)
        factors = [balanced(step, rank, run.scale) for step, rank in steps]
    return effective(run.weights, factors, run.scale), run.biases


def het_lora(run: Run) -> Final:
    """HetLoRA: padded factors, averaged by the norms of the clients' products.

    Y. J. Cho, L. Liu, Z. Xu, A. Fahrezi, G. Joshi 2024, arXiv 2401.06432. Differs from the paper: ranks are given, so
    self-pruning and its regulariser are left out; products carry the clients' scales alpha / r_k; and where all
    products are zero the clients' examples weigh.
    """
    factors = run.start(0, "ab")
    for round, shares in run.rounds():
        ends = trained_views(run, round, shares, factors)
        moved = [{name: np.zeros_like(factor) for name, factor in layer.items()} for layer in factors]
        for layer, pairs in enumerate(moved):
            norms = {k: np.linalg.norm(run.scale_of(k) * product(ends[k][layer])) for k in shares}
            total = sum(norms.values())
            for client, share in shares.items():
                weight = norms[client] / total if total > 0 else share
                rank = ends[client][layer]["a"].shape[0]
                pairs["a"][:rank] += weight * ends[client][layer]["a"]
                pairs["b"][:, :rank] += weight * run.scale_of(client) / run.scale * ends[client][layer]["b"]
        factors = moved
    return effective(run.weights, factors, run.scale), run.biases


def ro_lora(run: Run) -> Final:
    """RoLoRA: B is trained in odd rounds and A in even ones (Chen et al. 2025, arXiv 2502.01755, Algorithm 1)."""
    factors = run.start(0, "ab")
    for round, shares in run.rounds():
        sides = ["b" if round % 2 else "a"] * len(factors)
        ends = {client: run.train_factors((round, client), run.weights, factors, sides) for client in shares}
        factors = mean_factors(ends, shares)
    return effective(run.weights, factors, run.scale), run.biases


def fed_sa_lora(run: Run) -> tuple[Layers, dict[int, Layers]]:
    """FedSA-LoRA: A is averaged, B stays with its client (P. Guo et al. 2024, arXiv 2410.01463).

    Returns the averaged A and, for each client that ever took part, its B; its weights are W + s B_k A.
    """
    factors = run.start(0, "ab")
    common, own = [layer["a"] for layer in factors], {}
    for round, shares in run.rounds():
        starts = {k: own.get(k, [layer["b"] for layer in factors]) for k in shares}
        pairs = {k: [{"b": b, "a": a} for b, a in zip(starts[k], common, strict=True)] for k in shares}
        ends = {k: run.train_pairs(round, [k], run.weights, pairs[k])[k] for k in shares}
        common = mean({k: [layer["a"] for layer in end] for k, end in ends.items()}, shares)
        own |= {k: [layer["b"] for layer in end] for k, end in ends.items()}
    return common, own


def fed_sb(run: Run, rank: int) -> Final:
    """Fed-SB: W + s B R A with B and A fixed and R [r, r] averaged, started from a first full update.

    R. Singhal, K. Ponkshe, R. Vartak, L. R. Varshney, P. Vepakomma 2025, arXiv 2502.15436. Differs from the paper:
    the update whose SVD starts the factors is the mean of whole local trainings in round 1, where the paper takes one
    step of Adam, estimated by the sign of a gradient.
    """
    (first, shares), *others = run.rounds()
    ends = {client: run.train_weights((first, client), run.weights) for client in shares}
    factors = []
    for weight, end in zip(run.weights, mean(ends, shares), strict=True):
        u, values, vt = np.linalg.svd(end - weight, full_matrices=False)
        factors.append({"b": u[:, :rank], "r": np.diag(values[:rank]) / run.scale, "a": vt[:rank]})
    return trained_cores(run, others, factors)


def fed_sb_random(run: Run) -> Final:
    """Fed-SB with both outer factors drawn and R = 0."""
    factors = []
    for a, b in zip(run.start(0, "b"), run.start(0, "a"), strict=True):
        factors.append({"b": b["b"], "r": np.zeros((b["b"].shape[1], a["a"].shape[0])), "a": a["a"]})
    return trained_cores(run, run.rounds(), factors)


def trained_cores(run: Run, rounds: Iterable[tuple[int, dict[int, float]]], factors: Factors) -> Final:
    for round, shares in rounds:
        core = ["r"] * len(factors)
        ends = {client: run.train_factors((round, client), run.weights, factors, core) for client in shares}
        factors = mean_factors(ends, shares)
    return effective(run.weights, factors, run.scale), run.biases


def lora_fair(run: Run, ridge: float) -> Final:
    """LoRA-FAIR: the averaged B is corrected towards the mean product (Bian et al. 2024, arXiv 2411.14961, equation 8).

    The correction solves least squares with the rows of sqrt(ridge) I below those of A^T, whose solution is the
    ridge's. Differs from the paper: the distance is the squared Frobenius norm, solved exactly, where the paper
    runs SGD on a cosine similarity and an unsquared norm.
    """
    factors = run.start(0, "ab")
    for round, shares in run.rounds():
        ends = run.train_pairs(round, shares, run.weights, factors)
        ideal = mean({k: [product(layer) for layer in pairs] for k, pairs in ends.items()}, shares)
        factors = mean_factors(ends, shares)
        for layer, wanted in zip(factors, ideal, strict=True):
            rank = layer["a"].shape[0]
            left = np.vstack([layer["a"].T, np.sqrt(ridge) * np.eye(rank)])
            right = np.vstack([(wanted - product(layer)).T, np.zeros((rank, len(wanted)))])
            layer["b"] = layer["b"] + np.linalg.lstsq(left, right, rcond=None)[0].T
    return effective(run.weights, factors, run.scale), run.biases


def fr_lora(run: Run, rank: int) -> Final:
    """FRLoRA: each round starts from the base's principal pair, and the change of its product stays in the weights.

    Y. Yan, C.-M. Feng, W. Zuo, L. Zhu, R. S. M. Goh, Y. Liu, "Federated Residual Low-Rank Adaption of Large Language
    Models", ICLR 2025. The factors are averaged, not the products, as in the released code.
    """
    weights, first = run.weights, [balanced(weight, rank, run.scale) for weight in run.weights]
    for round, shares in run.rounds():
        below = effective(weights, first, -run.scale)
        factors = mean_factors(run.train_pairs(round, shares, below, first), shares)
        weights = effective(below, factors, run.scale)
    return weights, run.biases


def trained_views(run: Run, round: int, shares: Iterable[int], factors: Factors) -> dict[int, Factors]:
    """Return the pairs of the clients of a round, each trained in the client's own rank and scale."""
    ends = {}
    for client in shares:
        ends |= run.train_pairs(round, [client], run.weights, run.view(client, factors))
    return ends


# The linear algebra and calculus that the rules share.


def pair(weight: Matrix, drawn: Matrix, trained: str) -> dict[str, Matrix]:
    """Return a layer's pair in the order B, A: one drawn, the other zero."""
    if trained == "a":
        return {"b": drawn, "a": np.zeros((drawn.shape[1], weight.shape[1]))}
    return {"b": np.zeros((weight.shape[0], drawn.shape[0])), "a": drawn}


def product(layer: Mapping[str, Matrix]) -> Matrix:
    return reduce(np.matmul, layer.values())


def effective(weights: Layers, factors: Factors, scale: float) -> Layers:
    """Return W + scale * product, layer by layer."""
    return [weight + scale * product(layer) for weight, layer in zip(weights, factors, strict=True)]


def slope(layer: Mapping[str, Matrix], name: str, by_product: Matrix) -> Matrix:
    """Return the derivative by one factor, given the one by the product of all."""
    names, matrices = list(layer), list(layer.values())
    position = names.index(name)
    left = reduce(np.matmul, matrices[:position], np.eye(by_product.shape[0]))
    right = reduce(np.matmul, matrices[position + 1 :], np.eye(matrices[position].shape[1]))
    return left.T @ by_product @ right.T


def mean(ends: Mapping[int, Layers], shares: Mapping[int, float]) -> Layers:
    """Return the mean of the clients' arrays, position by position."""
    clients = list(shares)
    return [
        sum(shares[client] * array for client, array in zip(clients, arrays, strict=True))
        for arrays in zip(*(ends[client] for client in clients), strict=True)
    ]


def mean_factors(ends: Mapping[int, Factors], shares: Mapping[int, float]) -> Factors:
    """Return the mean of each factor by itself."""
    layers = range(len(next(iter(ends.values()))))
    names = [list(next(iter(ends.values()))[layer]) for layer in layers]
    return [
        {name: sum(share * ends[client][layer][name] for client, share in shares.items()) for name in names[layer]}
        for layer in layers
    ]


def best_approximation(matrix: Matrix, rank: int | None) -> Matrix:
    """Return the nearest matrix of at most this rank (Eckart and Young 1936)."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * values[:rank] @ vt[:rank]


def balanced(matrix: Matrix, rank: int, scale: float) -> dict[str, Matrix]:
    """Return B and A of this rank with scale * B A the best approximation, singular values shared evenly."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    roots = np.sqrt(values[:rank] / scale)
    return {"b": u[:, :rank] * roots, "a": roots[:, None] * vt[:rank]}


def descend(run: Run, job: tuple[int, int], start: tuple, projectors: Layers, momentum: float) -> tuple[Layers, Layers]:
    """Take a client's heavy-ball steps on weights and biases, from parameters and their moments (None: zero).

    A step is v <- momentum v + g, x <- x - lr v; in g, each weight's gradient is multiplied by its projector.
    """
    parameters, moments = start
    depth = len(projectors)
    moments = moments or [np.zeros_like(array) for array in parameters]
    for inputs, labels in run.batches(*job):
        by_weight, by_bias = gradient(parameters[:depth], parameters[depth:], inputs, labels)
        slopes = [g @ projector for g, projector in zip(by_weight, projectors, strict=True)] + by_bias
        moments = [momentum * v + g for v, g in zip(moments, slopes, strict=True)]
        parameters = [array - run.lr * v for array, v in zip(parameters, moments, strict=True)]
    return parameters, moments


def gradient(weights, biases, inputs, labels):
    """Return the gradients of the mean cross-entropy by the weights and by the biases."""
    layers = [inputs]
    for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        outputs = layers[-1] @ weight.T + bias
        layers.append(np.maximum(outputs, 0) if depth < len(weights) else outputs)
    shifted = np.exp(layers[-1] - layers[-1].max(axis=1, keepdims=True))
    back = (shifted / shifted.sum(axis=1, keepdims=True) - np.eye(shifted.shape[1])[labels]) / len(labels)
    by_weight, by_bias = [], []
    for depth in reversed(range(len(weights))):
        by_weight.insert(0, back.T @ layers[depth])
        by_bias.insert(0, back.sum(axis=0))
        back = back @ weights[depth] * (layers[depth] > 0)
    return by_weight, by_bias
