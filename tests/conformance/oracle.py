"""Federated low-rank training of a ReLU perceptron in plain NumPy: what the project must agree with.

It shares no code with the project. Three things are handed to it: the drawn factors, the cohorts, and the batches.
Biases train only where all weights do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Draw = Callable[[int, int, str], Matrix]


@dataclass
class Run:
    """One run: `parts` are the factors that train (b, a, ab, full); links close after `length` rounds (0: never)."""

    weights: list[Matrix]
    biases: list[Matrix]
    parts: str
    length: int
    lr: float
    scale: float
    draw: Draw

    def start_link(self, link: int) -> tuple[list[Matrix], list[Matrix]]:
        """Return each layer's A and B at the beginning of a link: one drawn, the other zero."""
        drawn = [self.draw(link, layer, self.parts) for layer in range(len(self.weights))]
        if self.parts == "a":
            return [np.zeros((b.shape[1], w.shape[1])) for b, w in zip(drawn, self.weights, strict=True)], drawn
        return drawn, [np.zeros((w.shape[0], a.shape[0])) for a, w in zip(drawn, self.weights, strict=True)]

    def train(self, cohorts: Sequence[Sequence[int]], batches: Callable, sizes: Mapping[int, int]) -> list[Matrix]:
        """Return the weights after one round a cohort; `batches(round, client)` yields pairs of inputs and labels."""
        link, age = 0, 0
        As, Bs = self.start_link(0) if self.parts != "full" else ([], [])
        for round, cohort in enumerate(cohorts, start=1):
            shares = np.array([sizes[client] for client in cohort]) / sum(sizes[client] for client in cohort)
            if self.parts == "full":
                replies = [self.train_full(batches(round, client)) for client in cohort]
                self.weights = mean([weights for weights, _ in replies], shares)
                self.biases = mean([biases for _, biases in replies], shares)
                continue
            replies = [self.train_factors(As, Bs, batches(round, client)) for client in cohort]
            As, Bs = mean([a for a, _ in replies], shares), mean([b for _, b in replies], shares)
            age += 1
            if age == self.length:
                self.weights = self.merged(As, Bs)
                link, age = link + 1, 0
                As, Bs = self.start_link(link)
        return self.weights if self.parts == "full" else self.merged(As, Bs)

    def merged(self, As: list[Matrix], Bs: list[Matrix]) -> list[Matrix]:
        return [w + self.scale * b @ a for w, a, b in zip(self.weights, As, Bs, strict=True)]

    def train_factors(self, As, Bs, steps):
        """Take a client's SGD steps; with G the gradient by the weight, B moves along s G A^T and A along s B^T G."""
        for inputs, labels in steps:
            gradients, _ = gradient(self.merged(As, Bs), self.biases, inputs, labels)
            for_a = [self.scale * b.T @ g for b, g in zip(Bs, gradients, strict=True)]
            for_b = [self.scale * g @ a.T for a, g in zip(As, gradients, strict=True)]
            if "a" in self.parts:
                As = [a - self.lr * step for a, step in zip(As, for_a, strict=True)]
            if "b" in self.parts:
                Bs = [b - self.lr * step for b, step in zip(Bs, for_b, strict=True)]
        return As, Bs

    def train_full(self, steps):
        """Take a client's SGD steps on weights and biases."""
        weights, biases = self.weights, self.biases
        for inputs, labels in steps:
            by_weight, by_bias = gradient(weights, biases, inputs, labels)
            weights = [w - self.lr * g for w, g in zip(weights, by_weight, strict=True)]
            biases = [b - self.lr * g for b, g in zip(biases, by_bias, strict=True)]
        return weights, biases


def mean(replies: Sequence[list[Matrix]], shares: Matrix) -> list[Matrix]:
    """Return the layer-wise mean of the clients' matrices."""
    return [
        sum(share * matrix for share, matrix in zip(shares, layer, strict=True)) for layer in zip(*replies, strict=True)
    ]


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
