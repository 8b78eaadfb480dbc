"""Linear regression whose constants are known exactly: the test bed for convergence theory.

The objective of a weight `W [outputs, inputs]` is `f(W) = (1 / num) sum_i 0.5 ||W x_i - y_i||^2`. Its Hessian is the
second-moment matrix `C = X^T X / num`, once a target, so the eigenvalues of C are all that a step size depends on.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.data import Dataset, Examples
from fedraclora.seeding import derive_seed, generator

Matrix = npt.NDArray[np.float64]


@dataclass
class Config:
    """Settings of the regression.

    num_inputs: number of inputs of an example.
    num_outputs: number of targets of an example.
    condition: ratio of the largest eigenvalue of C, which is 1, to the smallest.
    num_samples: number of examples; at least num_inputs.
    noise: standard deviation of the Gaussian noise on the targets, which leaves a residual that no weight removes.
    """

    num_inputs: int = 16
    num_outputs: int = 8
    condition: float = 100.0
    num_samples: int = 512
    noise: float = 0.0


def build(config: Config, *, seed: int) -> Dataset:
    """Return float64 inputs `[num, num_inputs]` and targets `[num, num_outputs]`, drawn from the seed; test = train.

    C has eigenvalues in geometric progression from 1 down to 1 / condition, exact to rounding. The targets are those
    of a Gaussian weight, plus the noise. Raises ValueError for settings that no data can meet.
    """
    _check(config)
    rng = generator(derive_seed(seed, "quadratic"))
    spectrum = np.geomspace(1.0, 1.0 / config.condition, config.num_inputs)
    left = _orthonormal(rng, config.num_samples, config.num_inputs)
    right = _orthonormal(rng, config.num_inputs, config.num_inputs)
    inputs = np.sqrt(config.num_samples) * (left * np.sqrt(spectrum)) @ right.T
    weight = rng.standard_normal((config.num_outputs, config.num_inputs))
    targets = inputs @ weight.T + config.noise * rng.standard_normal((config.num_samples, config.num_outputs))
    examples = Examples(torch.from_numpy(inputs), torch.from_numpy(targets))
    return Dataset(name="quadratic", train=examples, test=examples, task="regression", num_outputs=config.num_outputs)


def smoothness(dataset: Dataset) -> float:
    """Return L, the largest eigenvalue of C: the Lipschitz constant of the gradient of f."""
    return float(_eigenvalues(dataset)[-1])


def strong_convexity(dataset: Dataset) -> float:
    """Return mu, the smallest eigenvalue of C: the strong convexity constant of f."""
    return float(_eigenvalues(dataset)[0])


def minimiser(dataset: Dataset) -> Tensor:
    """Return W* `[num_outputs, num_inputs]`, the weight without bias that minimises f, in float64 by least squares."""
    inputs, targets = dataset.train.inputs.to(torch.float64), dataset.train.targets.to(torch.float64)
    solution: Tensor = torch.linalg.lstsq(inputs, targets).solution
    return solution.T.contiguous()


def _eigenvalues(dataset: Dataset) -> Tensor:
    inputs = dataset.train.inputs.to(torch.float64)
    eigenvalues: Tensor = torch.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    return eigenvalues


def _orthonormal(rng: np.random.Generator, num_rows: int, num_columns: int) -> Matrix:
    return np.linalg.qr(rng.standard_normal((num_rows, num_columns)))[0]


def _check(config: Config) -> None:
    if config.num_inputs < 1 or config.num_outputs < 1:
        raise ValueError(
            f"dataset.num_inputs={config.num_inputs}, dataset.num_outputs={config.num_outputs}: both must be positive"
        )
    if config.num_samples < config.num_inputs:
        raise ValueError(
            f"dataset.num_samples={config.num_samples} is below dataset.num_inputs={config.num_inputs}: C would "
            "be singular"
        )
    if config.condition < 1 or config.noise < 0:
        raise ValueError(
            f"dataset.condition={config.condition} has to be at least 1 and dataset.noise={config.noise} at least 0"
        )
    if config.num_inputs == 1 and config.condition != 1:
        raise ValueError(f"one input has one eigenvalue: dataset.condition={config.condition} has to be 1")
