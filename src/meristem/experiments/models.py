"""Built-in models in plain PyTorch: nothing in them knows of growth."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meristem.core.errors import nearest
from meristem.experiments.config import Choice, ConfigError, imported
from meristem.experiments.data import Data
from meristem.growing import find_axes, grow_


def mlp(
    inputs: int, outputs: int, hidden: list[int], norm: bool = False
) -> nn.Sequential:
    """Linear layers with ReLU between, on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [
            nn.Linear(inputs, width),
            *([nn.BatchNorm1d(width)] if norm else []),
            nn.ReLU(),
        ]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class ConvNet(nn.Module):
    """Three 3x3 convolutions of widths w, 2w, 4w with batch norm and ReLU, max-pooling
    between, average pooling at the end.
    """

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x))).mean((2, 3))
        out: Tensor = self.head(x)
        return out


class PositiveBias(nn.Linear):
    """A linear layer whose biases start positive: the absolute values of nn.Linear's
    own.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.bias.abs_()


def vgg(
    channels: int,
    outputs: int,
    size: int,
    convs: list[list[int]],
    hidden: list[int],
    strided: bool,
    positive_bias: bool,
) -> nn.Sequential:
    """Blocks of 3x3 convolutions with batch norm and ReLU, each block ending in a
    max-pool, then linear layers with ReLU.

    The convolutions and the last layer have no bias. `strided` lets the first
    convolution of a block halve the map instead of a max-pool; `positive_bias` takes
    the absolute value of the hidden biases.
    """
    layers: list[tuple[str, nn.Module]] = []
    for b, widths in enumerate(convs, 1):
        for i, width in enumerate(widths, 1):
            conv = nn.Conv2d(
                channels,
                width,
                3,
                2 if strided and i == 1 else 1,
                padding=1,
                bias=False,
            )
            layers += [
                (f"conv{b}_{i}", conv),
                (f"norm{b}_{i}", nn.BatchNorm2d(width)),
                (f"relu{b}_{i}", nn.ReLU()),
            ]
            channels = width
        if not strided:
            layers.append((f"pool{b}", nn.MaxPool2d(2)))
        size = math.ceil(size / 2) if strided else size // 2
    layers.append(("flatten", nn.Flatten()))
    inputs = channels * size * size
    for i, width in enumerate(hidden, 1):
        linear = (PositiveBias if positive_bias else nn.Linear)(inputs, width)
        layers += [(f"fc{i}", linear), (f"act{i}", nn.ReLU())]
        inputs = width
    layers.append(("head", nn.Linear(inputs, outputs, bias=False)))
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """A character language model."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class PreActBlock(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(
            F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))))
        )
        return out


class ResNet(nn.Module):
    """Three stages of pre-activation blocks of widths w, 2w, 4w; a strided convolution
    leads into the second and third.

    `stride` is the first convolution's: 2 makes every map half as wide and a step four
    times as cheap.
    """

    def __init__(
        self, channels: int, outputs: int, width: int, blocks: int, stride: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.stage1 = nn.Sequential(*[PreActBlock(width) for _ in range(blocks)])
        self.down1 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False)
        self.stage2 = nn.Sequential(*[PreActBlock(2 * width) for _ in range(blocks)])
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1, bias=False)
        self.stage3 = nn.Sequential(*[PreActBlock(4 * width) for _ in range(blocks)])
        self.norm = nn.BatchNorm2d(4 * width)
        self.head = nn.Linear(4 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(self.stage1(self.stem(x)))
        x = self.stage3(self.down2(self.stage2(x)))
        out: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return out


def imported_model(name: str, parameters: Mapping[str, Any]) -> nn.Module:
    """The model that "package.module:name" gives: a module, or what makes one.

    Raises:
        ConfigError: It cannot be imported, does not take the parameters, or makes none.
    """
    made = imported(name)
    if isinstance(made, nn.Module) and parameters:
        raise ConfigError(f"{name!r} is a module already, and takes no arguments")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ConfigError(f"{name!r} is neither a module nor makes one")
        try:
            made = made(**parameters)
        except TypeError as error:
            raise ConfigError(
                f"{name!r} does not take these arguments: {error}"
            ) from None
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"model = {name!r} gives a {type(made).__name__}, not a torch.nn.Module"
        )
    return made


def build(choice: Choice, data: Data) -> nn.Module:
    """The model that a configuration names, sized for the data.

    Raises:
        ConfigError: Unknown parameters, or a factory that cannot be imported.
    """
    name, parameters = (
        (choice, {}) if isinstance(choice, str) else next(iter(choice.items()))
    )
    if ":" in name:
        # Runs of one process must not train one object.
        return copy.deepcopy(imported_model(name, parameters))
    shape = data.x_train.shape[1:]
    make: Callable[..., nn.Module]
    kinds: dict[str, Callable[..., nn.Module]] = {
        "convnet": ConvNet,
        "vgg": vgg,
        "resnet": ResNet,
    }
    fixed: dict[str, Any]
    if name == "mlp":
        make, fixed = mlp, {"inputs": int(shape.numel()), "outputs": data.outputs}
    elif name in kinds:
        if len(shape) != 3:
            raise ConfigError(
                f"model = {name!r} needs images; the data have shape {tuple(shape)}"
            )
        fixed = {"channels": int(shape[0]), "outputs": data.outputs}
        make = kinds[name]
        fixed |= {"size": int(shape[1])} if name == "vgg" else {}
    else:
        if data.task != "language":
            raise ConfigError(
                "model = 'gpt' needs text; hint: data = 'text/tinyshakespeare'"
            )
        make, fixed = GPT, {"vocabulary": data.outputs, "context": int(shape[0])}
    defaults = DEFAULTS[name]
    for key in parameters:
        if key not in defaults:
            raise ConfigError(
                f"model.{name} has no parameter {key!r}.{nearest(key, defaults)} "
                f"Known: {', '.join(defaults)}"
            )
    try:
        return make(**fixed, **(defaults | parameters))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.{name} cannot be built with {parameters}: {error}"
        ) from None


DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [32, 32], "norm": False},
    "convnet": {"width": 16},
    "vgg": {
        "convs": [[8], [16]],
        "hidden": [32, 32],
        "strided": False,
        "positive_bias": False,
    },
    "resnet": {"width": 16, "blocks": 1, "stride": 1},
    "gpt": {"width": 96, "heads": 4, "hidden": 384, "depth": 2},
}


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The weights that Muon is made for: of linear layers, but not of the last one."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [linear.weight for linear in linears[:-1]]


def sized(model: nn.Module, example: Tensor, sizes: dict[str, int]) -> nn.Module:
    """`model` with axes of other sizes and fresh weights: every module that has
    `reset_parameters` calls it, the inner ones first. What a model draws elsewhere
    keeps the distribution of its small size.

    Raises:
        ConfigError: A size is smaller than the model's own.
    """
    if not sizes:
        return model
    axes = find_axes(model, example)
    counts = {name: size - axes.named(name).size for name, size in sizes.items()}
    small = [name for name, count in counts.items() if count < 0]
    if small:
        raise ConfigError(
            f"sizes.{small[0]} = {sizes[small[0]]} is smaller than the model's "
            f"{axes.named(small[0]).size}"
        )
    counts = {name: count for name, count in counts.items() if count}
    if counts:
        grow_(model, counts, example)
        for module in reversed(list(model.modules())):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model
