"""SENN's score: how far the loss could still fall along the natural gradient, with the
parameters there are and with some that are not there yet.

For a layer that reads a (with a 1 for the bias) and whose pre-activation receives the
gradient g, with the second moments A = E[a a^T] and S = E[g g^T] and the gradient dW =
E[g a^T] of its weights (K-FAC),

    eta = Tr[S^-1 dW A^-1 dW^T],     summed over the layers,

and candidate inputs a_p of that layer add, with g_r = g - dW A^-1 a and C = E[g_r
a_p^T],

    Delta eta  = Tr[S^-1 C (A_p - A_pc A^-1 A_cp)^-1 C^T]    exactly,
    Delta eta' = Tr[S^-1 C A_p^-1 C^T] <= Delta eta.

S is made of the gradients of the loss itself, so nothing has a unit: N eta is Rao's
score statistic, and eta / 2 the log likelihood per example that a step along the
natural gradient would win. From Mitchell, Menzenbach, Kersting, Mundt, "Self-Expanding
Neural Networks", 2024, arXiv 2307.04526; K-FAC for convolutions: Grosse, Martens, 2016,
arXiv 1602.01407.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from meristem.core.errors import DataError
from meristem.lab.ledger import Meter
from meristem.lab.losses import Loss, evaluate
from meristem.structure.layers import channel_of, is_norm, is_plain, layer_of
from meristem.structure.tracer import tensors
from meristem.structure.twin import submodule

DAMPING = 0.01
"""Added to every factor: this share of its mean diagonal."""
ENTRIES = 2**22
"""Numbers that a layer reads from one batch, at the most; of more examples, whose
patches would not fit, the first are taken.
"""


@dataclass(frozen=True)
class Factors:
    """Second moments of one layer over some examples, in float64.

    Attributes:
        gradient: dW = E[g a^T], (outputs, inputs).
        inputs: A = E[a a^T], the last entry of a being 1 where the layer has a bias.
        outputs: S = E[g g^T].
        samples: The number of examples.
        spread: What the score of one example is on the average, Tr[S^-1 dW_n A^-1
            dW_n^T], in degrees of freedom. It is 1 where g and a are independent, as
            K-FAC takes them to be, and large where the gradients of many positions of
            an image point the same way. Scores are divided by it, so that N eta keeps
            its expectation where nothing is left to learn.
    """

    gradient: Tensor
    inputs: Tensor
    outputs: Tensor
    samples: int
    spread: float = 1.0

    def __add__(self, other: Factors) -> Factors:
        """The moments over the examples of both."""
        # Moments are means: they are weighed by their examples.
        total = self.samples + other.samples
        parts = ("gradient", "inputs", "outputs", "spread")
        mean = {
            n: (self.samples * getattr(self, n) + other.samples * getattr(other, n))
            / total
            for n in parts
        }
        return Factors(**mean, samples=total)

    def damped(self, damping: float) -> Factors:
        """The same layer with `damping` times its mean diagonal added to each factor."""
        return replace(
            self,
            inputs=damped(self.inputs, damping),
            outputs=damped(self.outputs, damping),
        )

    @property
    def score(self) -> float:
        """eta = Tr[S^-1 dW A^-1 dW^T]."""
        return agreement(self, self.gradient, self.gradient)


@dataclass(frozen=True)
class Candidates:
    """Moments of inputs that a layer does not have yet: gradient E[g a_p^T], cross E[a
    a_p^T], inputs E[a_p a_p^T].
    """

    gradient: Tensor
    cross: Tensor
    inputs: Tensor

    def damped(self, damping: float, layer: Factors) -> Candidates:
        """Damped as `layer` is: by the same number, since both belong to one matrix."""
        added = damping * mean_diagonal(layer.inputs)
        eye = torch.eye(
            len(self.inputs), dtype=self.inputs.dtype, device=self.inputs.device
        )
        return replace(self, inputs=self.inputs + added * eye)


def agreement(layer: Factors, first: Tensor, second: Tensor) -> float:
    """Tr[S^-1 dW_1 A^-1 dW_2^T]: the score with the gradients of two sets of examples,
    free of their sampling error where these are independent.
    """
    left, right = (
        whitened(layer.outputs, whitened(layer.inputs, one.T).T)
        for one in (first, second)
    )
    return (left * right).sum().item() / layer.spread


def residual(layer: Factors, candidates: Candidates) -> Tensor:
    """C = E[g_r a_p^T]: what of the gradient the layer's own inputs do not explain,
    against the candidates.
    """
    explained = torch.cholesky_solve(candidates.cross, _root(layer.inputs))
    return candidates.gradient - layer.gradient @ explained


def bound(layer: Factors, candidates: Candidates) -> float:
    """Delta eta' = Tr[S^-1 C A_p^-1 C^T], which punishes candidates that resemble what
    is there.
    """
    return _norm(layer, residual(layer, candidates), candidates.inputs)


def gain(layer: Factors, candidates: Candidates) -> float:
    """Delta eta = eta with the candidates - eta without them."""
    return _norm(layer, residual(layer, candidates), unexplained(layer, candidates))


def unexplained(layer: Factors, candidates: Candidates) -> Tensor:
    """A_p - A_pc A^-1 A_cp: the moments of what the layer's own inputs do not explain
    of the candidates.
    """
    # Schur complement by a triangular solve, which keeps it symmetric.
    half = whitened(layer.inputs, candidates.cross)
    return candidates.inputs - half.T @ half


@dataclass(frozen=True)
class Removal:
    """What inputs of a layer are worth, unit by unit; with D = A, n = D^-1 G~, d_i = 1
    / (D^-1)_ii (a block, where a unit has several entries), and G~, W~ the gradient and
    the weights whitened by S,

        freeze_i = d_i ||n_i||^2,     prune_i = d_i ||n_i - W~_i||^2:

    what the score loses where the weights that read unit i no longer learn, and where
    they are set to zero.
    """

    freeze: Tensor
    prune: Tensor


def removal(layer: Factors, weight: Tensor, units: Sequence[Tensor]) -> Removal:
    """What units are worth to a layer that reads them.

    Args:
        layer: Its factors, damped.
        weight: Its weights, (outputs, inputs), the bias last where it has one.
        units: For every unit the inputs of the layer that are its own.
    """
    root = _root(layer.inputs)
    gradient = whitened(layer.outputs, layer.gradient).T
    step = torch.cholesky_solve(gradient, root)
    # Weights are whitened like the gradient, so that both can be compared.
    wanted = _root(layer.outputs).T @ weight.double().to(root.device)
    inverse = torch.cholesky_inverse(root)
    found = []
    for entries in units:
        block = inverse[entries][:, entries]
        found.append(
            [
                whitened(block, one[entries]).square().sum()
                for one in (step, step - wanted.T)
            ]
        )
    freeze, prune = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T
    return Removal(freeze / layer.spread, prune / layer.spread)


def compensated(inputs: Tensor, weight: Tensor, gone: Tensor) -> Tensor:
    """W with W_act + W_pruned D_pruned,act D_act^-1: the inputs that stay take over
    what is linear in them of those that go.

    Args:
        inputs: D, the second moment of all inputs, damped.
        weight: W, (outputs, inputs); the columns in `gone` come back as they were.
        gone: Indices of the inputs that go.
    """
    stay = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    stay[gone] = False
    wide = weight.double()
    taken = torch.cholesky_solve(
        inputs[stay][:, gone] @ wide[:, gone].T, _root(inputs[stay][:, stay])
    )
    result = wide.clone()
    result[:, stay] += taken.T
    return result.to(weight)


def exact_score(rows: Tensor, gradient: Tensor, damping: float = 0.0) -> float:
    """eta = g^T F^-1 g with F = J^T J / N, for parameters few enough to hold it.

    Args:
        rows: J, (N, parameters): the derivative of every example's output, as one row
            (of its loss, for the loss's own metric).
        gradient: g, (parameters,): the gradient of the mean loss.
        damping: Added to F: this share of its mean diagonal.
    """
    fisher = rows.T.double() @ rows.double() / len(rows)
    root = whitened(damped(fisher, damping), gradient.double()[:, None])
    return root.square().sum().item()


def largest_number(alpha: float, tau: float, most: float) -> float:
    """N_s = 1 + (ln lambda - ln alpha) / ln(1 + tau): fewer additions than this can be
    accepted one after the other while no parameter moves, if each must add more than
    `tau` of the score and `alpha` in all, and the score never exceeds `most`.
    """
    return 1 + math.log(most / alpha) / math.log1p(tau)


@dataclass(frozen=True)
class Curvature:
    """Factors of every layer that can be scored, by name: linear layers, ungrouped
    convolutions, affine norms.
    """

    layers: Mapping[str, Factors]

    def __add__(self, other: Curvature) -> Curvature:
        return Curvature(
            {name: layer + other.layers[name] for name, layer in self.layers.items()}
        )

    def score(self, damping: float = DAMPING) -> float:
        """eta of the whole net."""
        return sum(layer.damped(damping).score for layer in self.layers.values())


def score(first: Curvature, second: Curvature, damping: float = DAMPING) -> float:
    """eta of the whole net without its sampling error: the gradients of two sets of
    examples against each other.
    """
    total = 0.0
    for name, layer in (first + second).layers.items():
        total += agreement(
            layer.damped(damping),
            first.layers[name].gradient,
            second.layers[name].gradient,
        )
    return total


def measure(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    meter: Meter | None = None,
) -> Curvature:
    """The curvature of a copy of a model whose gradients may be written, in eval mode;
    one pass forward and backward.

    Only one batch at a time is held, so memory does not grow with the data. `layers`
    names the layers to look at, all that can be scored by default; `meter` counts what
    it costs.
    """
    found: dict[str, Factors] = {}
    names = (
        [n for n, m in model.named_modules() if scored(m)] if layers is None else layers
    )
    meter = meter if meter is not None else Meter()

    def one(batch: Any) -> dict[str, Factors]:
        with Watched(model, names) as watched:
            watched.run(loss, batch)
        return {name: watched.factors(name) for name in watched.calls}

    for batch in batches:
        for name, factors in meter.run(batch, lambda: one(batch)).items():  # noqa: B023
            found[name] = found[name] + factors if name in found else factors
    return Curvature(found)


def scored(module: nn.Module) -> bool:
    """Whether the score knows a layer."""
    if is_norm(module):
        tracks = getattr(module, "running_mean", 0) is not None
        return module.weight is not None and tracks
    return is_plain(module)


class Watched:
    """Sees what some layers of a copy of a model read and which gradient comes back to
    them, while it is entered.

    Attributes:
        calls: By layer, for every call: what it read, and what it gave.
        samples: Examples of the batch, as the rows of the model's output count them:
            images, or tokens.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = list(names)
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.samples = 0

    def __enter__(self) -> Watched:
        modules = dict(self.model.named_modules())
        self._hooks = [
            modules[name].register_forward_hook(self._seen(name), with_kwargs=True)
            for name in self.names
        ]
        self._hooks.append(self.model.register_forward_hook(self._counted))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, name: str) -> Any:
        def hook(
            _module: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, Tensor],
            output: Tensor,
        ) -> None:
            # A layer in a frozen part sees no gradient, and has no score.
            if output.requires_grad:
                # The gradient of the pre-activation, which autograd would drop.
                output.retain_grad()
                self.calls.setdefault(name, []).append(
                    ((*args, *kwargs.values())[0], output)
                )

        return hook

    def _counted(self, _module: nn.Module, _args: Any, output: Any) -> None:
        out = next(
            (tensor for tensor in tensors(output) if tensor.dim()), None
        )  # a loss may stand before the logits
        self.samples += out.numel() // max(_classes(out), 1) if out is not None else 1

    def run(self, loss: Loss, batch: Any) -> None:
        """The loss and its gradients on one batch."""
        self.model.eval()
        self.model.requires_grad_(True)
        # Only what comes back to the layers counts, not what the weights collect.
        self.model.zero_grad()
        with torch.enable_grad():
            value = evaluate(loss, self.model, batch)
            if value.requires_grad:
                value.backward()
        self.model.zero_grad()

    def factors(self, name: str) -> Factors:
        """The moments of one layer over the batch."""
        module = submodule(self.model, name)
        if is_norm(module):
            return self._norm_factors(name, module)
        inputs, gradients, _ = self.rows(name)
        samples = self.used(name)
        moments = (
            product(gradients, inputs) / samples,
            product(inputs, inputs) / samples,
            product(gradients, gradients) / len(inputs),
        )
        return Factors(
            *moments, samples, _spread(inputs, gradients, *moments[1:], samples)
        )

    def used(self, name: str) -> int:
        """The examples behind the rows of a layer."""
        module = submodule(self.model, name)
        read, given = self.calls[name][0]
        return max(1, self.samples * leading(module, read, given) // len(given))

    def rows(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """What a layer reads, with a 1 where it has a bias, (rows, inputs); the
        gradient g of its pre-activation for the loss of one example, and what it gives,
        (rows, outputs); in float32 at least.
        """
        module = submodule(self.model, name)
        parts = []
        for read, given in self.calls[name]:
            first = leading(module, read, given)
            back = (
                given.grad[:first]
                if given.grad is not None
                else torch.zeros_like(given[:first])
            )
            parts.append(
                (
                    with_bias(module, single(patches(module, read[:first].detach()))),
                    self.samples * single(flat(module, back)),
                    single(flat(module, given[:first].detach())),
                )
            )
        inputs, gradients, outputs = (
            torch.cat(part) for part in zip(*parts, strict=True)
        )
        return inputs, gradients, outputs

    def _norm_factors(self, name: str, module: Any) -> Factors:
        """Scale and shift of a norm: few enough for the Fisher matrix of whole
        examples.
        """
        rows: Tensor | None = None
        for read, given in self.calls[name]:
            gradient = (
                given.grad if given.grad is not None else torch.zeros_like(given)
            ).double()
            layer = layer_of(module)
            assert layer is not None
            assert layer.normalised is not None
            normalised = layer.normalised(module, read.detach())
            parts = [gradient * normalised.double()]
            parts += [gradient] if getattr(module, "bias", None) is not None else []
            shape = module.weight.shape
            # Batch and group norms scale the channels, the second dimension.
            over = parts
            if not hasattr(module, "normalized_shape"):
                over = [part.movedim(1, -1) for part in parts]
            per_row = torch.cat(
                [part.reshape(len(given), -1, shape.numel()).sum(1) for part in over], 1
            )
            rows = (
                per_row if rows is None or len(rows) != len(per_row) else rows + per_row
            )
        assert rows is not None
        rows = self.samples * rows
        mean = rows.sum(0, keepdim=True) / self.samples
        return Factors(
            mean, rows.T @ rows / self.samples, rows.new_ones(1, 1), self.samples
        )


def _spread(
    inputs: Tensor, gradients: Tensor, within: Tensor, outward: Tensor, samples: int
) -> float:
    """The mean score of single examples, in degrees of freedom; every example has
    equally many rows.
    """
    read, back = (
        whitened(cast(damped(moment, DAMPING), rows), rows.T).T
        for moment, rows in ((within, inputs), (outward, gradients))
    )
    if len(read) > samples:
        # Every example has as many positions as the others.
        rows = len(read) // samples
        read, back = (
            part[: samples * rows].reshape(samples, rows, -1) for part in (read, back)
        )
        mean = torch.bmm(back.transpose(1, 2), read).square().sum().item() / samples
    else:
        mean = (read.square().sum(1) * back.square().sum(1)).mean().item()
    free = effective(within, DAMPING) * effective(outward, DAMPING)
    return max(mean / free, torch.finfo(torch.float64).tiny) if free and mean else 1.0


def single(rows: Tensor) -> Tensor:
    """Rows in float32, or in float64 where they are in it."""
    return rows if rows.dtype == torch.float64 else rows.float()


def cast(matrix: Tensor, rows: Tensor) -> Tensor:
    """A damped moment in the dtype of some rows, where it must still have a root."""
    result = matrix.to(rows)
    # What is tiny in float64 is nothing in float32.
    least = 1e4 * torch.finfo(result.dtype).tiny
    return result + least * torch.eye(
        len(result), dtype=result.dtype, device=result.device
    )


def product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over the rows of a batch, in float64 as all sums over batches are."""
    return (left.T @ right).double()


def patches(module: nn.Module, read: Tensor) -> Tensor:
    """What every output position of a layer reads, in rows.

    Returns:
        (rows, inputs), or (rows, channels x kernel).
    """
    layer = layer_of(module)
    assert layer is not None
    assert layer.patches is not None
    return layer.patches(module, read)


def flat(module: nn.Module, given: Tensor) -> Tensor:
    """What a layer gives (or its gradient) in rows, as `patches` has them: (rows,
    outputs).
    """
    return given.movedim(channel_of(module, given), -1).reshape(
        -1, given.shape[channel_of(module, given)]
    )


def with_bias(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows with a 1 appended where the layer has a bias."""
    return (
        torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        if module.bias is not None
        else rows
    )


def leading(module: nn.Module, read: Tensor, given: Tensor) -> int:
    """How many examples of a batch, the first ones, are looked at."""
    kernel = getattr(module, "kernel_size", ())
    # Many rows per example: the first examples stand for all.
    each = read.numel() // len(read)
    if kernel:  # every output position reads a patch
        each = given[0, 0].numel() * read.shape[1] * math.prod(kernel)
    return max(1, min(len(read), ENTRIES // each))


def _classes(output: Tensor) -> int:
    """How many numbers an output has for one example: the last dimension, or the second
    of maps.
    """
    if output.dim() < 2:
        return 1
    return output.shape[1] if output.dim() > 3 else output.shape[-1]


def mean_diagonal(matrix: Tensor) -> float:
    """The mean diagonal entry; never zero, so that a factor without any entry can be
    damped too.
    """
    return (
        max(matrix.diagonal().mean().item(), torch.finfo(torch.float64).tiny)
        if len(matrix)
        else 0.0
    )


def damped(matrix: Tensor, damping: float) -> Tensor:
    """The matrix with `damping` times its mean diagonal added."""
    return matrix + damping * mean_diagonal(matrix) * torch.eye(
        len(matrix), dtype=matrix.dtype, device=matrix.device
    )


def effective(matrix: Tensor, damping: float) -> float:
    """How many dimensions a second moment has beside its damping: Tr[M (M +
    damping)^-1]; the logits of k classes have k - 1.
    """
    solved = torch.cholesky_solve(matrix, _root(damped(matrix, damping)))
    return float(solved.diagonal().sum())


def _root(matrix: Tensor) -> Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise DataError(
            "the gradients or activations of a growth batch are not finite; nothing was "
            "changed. hint: half precision overflows here; measure in float32, as loss= "
            "under autocast does"
        )
    root: Tensor = torch.linalg.cholesky(matrix)
    return root


def whitened(matrix: Tensor, columns: Tensor) -> Tensor:
    """L^-1 columns, where L L^T is the matrix."""
    solved: Tensor = torch.linalg.solve_triangular(_root(matrix), columns, upper=False)
    return solved


def _norm(layer: Factors, residual: Tensor, inputs: Tensor) -> float:
    return (
        whitened(layer.outputs, whitened(inputs, residual.T).T).square().sum().item()
        / layer.spread
    )
