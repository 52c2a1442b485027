"""Activations that start as the identity, so that a layer can be inserted anywhere
without changing the function.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rational(nn.Module):
    """The rational activation of SENN, per unit: sigma(x) = alpha x + (beta + gamma x)
    / (1 + x^2).

    It starts as the identity: alpha = 1, beta = gamma = 0. From Mitchell, Mundt,
    Kersting, "Self-Expanding Neural Networks", 2023, arXiv 2307.04526.

    Args:
        width: Units, each with coefficients of its own.
        dim: The dimension of the input that holds the units: -1 after a linear layer,
            -3 after a 2-d convolution.

    Examples:
        >>> Rational(3)(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[-1.,  0.,  2.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, width: int, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        self.alpha = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # Coefficients stand along the dimension of the units.
        alpha, beta, gamma = (
            p.reshape(-1, *[1] * (-self.dim - 1))
            for p in (self.alpha, self.beta, self.gamma)
        )
        return alpha * x + (beta + gamma * x) / (1 + x * x)

    def tangents(self, x: Tensor) -> list[Tensor]:
        """At the identity: d sigma / d beta, d sigma / d gamma."""
        return [1 / (1 + x * x), x / (1 + x * x)]

    def extra_repr(self) -> str:
        return f"{len(self.alpha)}, dim={self.dim}"


class PReLU(nn.Module):
    """A rectifier with a slope of its own for every unit: sigma(x) = max(0, x) + slope
    min(0, x); it starts as the identity.

    As `torch.nn.PReLU`, from He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", 2015,
    arXiv 1502.01852, along any dimension.

    Args:
        width: Units, each with a slope of its own.
        dim: The dimension of the input that holds the units: -1 after a linear layer,
            -3 after a 2-d convolution.

    Examples:
        >>> PReLU(3)(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[-1.,  0.,  2.]], grad_fn=<SubBackward0>)
    """

    def __init__(self, width: int, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim
        self.slope = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Written with two rectifiers: a select would hide the slope from autograd at 0.
        return x.relu() - self.slope.reshape(-1, *[1] * (-self.dim - 1)) * (-x).relu()

    def tangents(self, x: Tensor) -> list[Tensor]:
        """At the identity: d sigma / d slope."""
        return [-(-x).relu()]

    def extra_repr(self) -> str:
        return f"{len(self.slope)}, dim={self.dim}"


IDENTITIES: dict[str, type[Rational] | type[PReLU]] = {
    "rational": Rational,
    "prelu": PReLU,
}
"""Every activation that starts as the identity, by its name."""
