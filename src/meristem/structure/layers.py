"""What is known of torch's own layers: one row per type, read by everything that asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm

from meristem.structure.twin import submodule

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One type of layer.

    Attributes:
        types: The classes that the row speaks for, subclasses included.
        mirrored: The attributes that follow from the shape of its weight and the number
            of its groups.
        channel: The dimension of its input and output that holds the units, for a
            tensor of so many dimensions. None where it is no contraction.
        plain: Whether a layer of the row contracts all its inputs with one matrix.
        patches: What every output position reads: (rows, inputs), or
            (rows, channels x kernel).
        identity: A layer of its kind that passes `width` units on, without data.
        normalised: For norms, what the weight scales and the bias shifts.
        sized_by: The tensor whose shape they follow.
    """

    types: tuple[type[nn.Module], ...]
    mirrored: Callable[[Any, Shape, int], dict[str, Any]]
    channel: Callable[[int], int] | None = None
    plain: Callable[[Any], bool] = lambda module: False
    patches: Callable[[Any, Tensor], Tensor] | None = None
    identity: Callable[[Any, int], nn.Module] | None = None
    normalised: Callable[[Any, Tensor], Tensor] | None = None
    sized_by: str = "weight"


def _linear_attributes(module: nn.Linear, shape: Shape, groups: int) -> dict[str, Any]:
    return {"out_features": shape[0], "in_features": shape[1]}


def _bilinear_attributes(
    module: nn.Bilinear, shape: Shape, groups: int
) -> dict[str, Any]:
    first, second = shape[1], shape[2]
    return {
        "out_features": shape[0],
        "in1_features": first,
        "in2_features": second,
    }


def _convolution_attributes(module: Any, shape: Shape, groups: int) -> dict[str, Any]:
    # The kernel of a grouped convolution holds one group of inputs, (g o, i); that of a
    # transposed one holds one group of outputs, (g i, o).
    if module.transposed:
        into, out = shape[0], shape[1] * groups
    else:
        into, out = shape[1] * groups, shape[0]
    return {"in_channels": into, "out_channels": out, "groups": groups}


def _attention_attributes(
    module: nn.MultiheadAttention, shape: Shape, groups: int
) -> dict[str, Any]:
    # Its code divides the width by the heads: whole heads come and go.
    width = shape[0]
    found = {"embed_dim": width, "num_heads": width // module.head_dim}
    if module._qkv_same_embed_dim:
        found |= {"kdim": width, "vdim": width}
    return found


def _gates(mode: str) -> int:
    return {"LSTM": 4, "GRU": 3}.get(mode, 1)


def _identity_linear(module: nn.Linear, width: int) -> nn.Module:
    return nn.Linear(width, width, device="meta")


def _identity_convolution(module: Any, width: int) -> nn.Module:
    kernel = tuple(module.kernel_size)
    if not all(size % 2 for size in kernel):
        kernel = (1,) * len(kernel)  # an even kernel has no middle
    kind: Any = next(
        kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)
    )
    padding = tuple(size // 2 for size in kernel)
    layer: nn.Module = kind(
        width,
        width,
        kernel,
        padding=padding,
        padding_mode=module.padding_mode,
        device="meta",
    )
    return layer


def _linear_patches(module: nn.Linear, read: Tensor) -> Tensor:
    return read.reshape(-1, read.shape[-1])


def _convolution_patches(module: Any, read: Tensor) -> Tensor:
    dims = len(module.kernel_size)
    size = math.prod(module.kernel_size)
    channels = read.shape[1]
    unpadded = module.padding in ((0,) * dims, "valid", "same")
    if size == 1 and all(step == 1 for step in module.stride) and unpadded:
        return read.movedim(1, -1).reshape(-1, channels)
    # Kernels that are 1 at one place each unfold the input, for every number of
    # dimensions.
    one_hot = torch.eye(size, dtype=read.dtype, device=read.device)
    one_hot = one_hot.reshape(size, 1, *module.kernel_size)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        around = module._reversed_padding_repeated_twice
        read = F.pad(read, around, mode=module.padding_mode)
        padding = 0
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    unfolded: Tensor = convolve(
        read,
        one_hot.repeat(channels, *[1] * (dims + 1)),
        None,
        module.stride,
        padding,
        module.dilation,
        channels,
    )
    return unfolded.movedim(1, -1).reshape(-1, channels * size)


def _plain_convolution(module: Any) -> bool:
    return module.groups == 1 and not module.transposed


def _batch_normalised(module: Any, read: Tensor) -> Tensor:
    return F.batch_norm(read, module.running_mean, module.running_var, eps=module.eps)


def _group_normalised(module: nn.GroupNorm, read: Tensor) -> Tensor:
    return F.group_norm(read, module.num_groups, eps=module.eps)


def _layer_normalised(module: nn.LayerNorm, read: Tensor) -> Tensor:
    return F.layer_norm(read, module.normalized_shape, eps=module.eps)


def _rms_normalised(module: nn.RMSNorm, read: Tensor) -> Tensor:
    return F.rms_norm(read, module.normalized_shape, eps=module.eps)


LAYERS: Mapping[str, Layer] = {
    "linear": Layer(
        (nn.Linear,),
        _linear_attributes,
        channel=lambda rank: rank - 1,
        plain=lambda module: True,
        patches=_linear_patches,
        identity=_identity_linear,
    ),
    "convolution": Layer(
        (nn.modules.conv._ConvNd,),
        _convolution_attributes,
        channel=lambda rank: 1,
        plain=_plain_convolution,
        patches=_convolution_patches,
        identity=_identity_convolution,
    ),
    "bilinear": Layer((nn.Bilinear,), _bilinear_attributes),
    "embedding": Layer(
        (nn.Embedding,),
        lambda module, shape, groups: {
            "num_embeddings": shape[0],
            "embedding_dim": shape[1],
        },
    ),
    "batch_norm": Layer(
        (nn.modules.batchnorm._NormBase,),
        lambda module, shape, groups: {"num_features": shape[0]},
        normalised=_batch_normalised,
    ),
    "group_norm": Layer(
        (nn.GroupNorm,),
        lambda module, shape, groups: {"num_channels": shape[0], "num_groups": groups},
        normalised=_group_normalised,
    ),
    "layer_norm": Layer(
        (nn.LayerNorm,),
        lambda module, shape, groups: {"normalized_shape": tuple(shape)},
        normalised=_layer_normalised,
    ),
    "rms_norm": Layer(
        (nn.RMSNorm,),
        lambda module, shape, groups: {"normalized_shape": tuple(shape)},
        normalised=_rms_normalised,
    ),
    "prelu": Layer(
        (nn.PReLU,),
        lambda module, shape, groups: {"num_parameters": shape[0]},
    ),
    "recurrent": Layer(
        (nn.RNNBase,),
        lambda module, shape, groups: {"hidden_size": shape[0] // _gates(module.mode)},
        sized_by="weight_hh_l0",
    ),
    "recurrent_cell": Layer(
        (nn.RNNCellBase,),
        lambda module, shape, groups: {"hidden_size": shape[1]},
        sized_by="weight_hh",
    ),
    "attention": Layer(
        (nn.MultiheadAttention,),
        _attention_attributes,
        sized_by="out_proj.weight",
    ),
}
"""Every type of layer that is known. A new one is one row."""


def beside_weights(module: nn.Module) -> Iterator[Tensor]:
    """The buffers of a module whose new entries are known: statistics of norms, the
    vectors of a spectral norm, and what has the shape of a parameter beside it (a mask
    of a pruned weight, the noise of a noisy one).
    """
    is_norm = isinstance(module, (nn.modules.batchnorm._NormBase, _SpectralNorm))
    shapes = {tuple(parameter.shape) for parameter in module.parameters(False)}
    for name, buffer in module.named_buffers(recurse=False):
        stem = name.rpartition("_")[0]
        iterated = name.endswith(("_u", "_v")) and f"{stem}_orig" in module._parameters
        if is_norm or iterated or (buffer.dim() and tuple(buffer.shape) in shapes):
            yield buffer


def weight_name(model: nn.Module, name: str) -> str:
    """The name of the weight that a tensor stands for.

    "0.parametrizations.weight.original1", "0.weight_v" of a weight norm and
    "0.weight_orig" of a pruned or spectrally normed layer are what "0.weight" is made of.
    """
    module, _, leaf = name.rpartition(".")
    prefix = f"{module}." if module else ""
    if leaf.startswith("original") and ".parametrizations." in f".{name}":
        outer, _, inner = module.rpartition("parametrizations.")
        return f"{outer}{inner}"
    holder = submodule(model, module)
    if leaf.endswith("_v") and f"{leaf[:-2]}_g" in holder._parameters:
        return f"{prefix}{leaf[:-2]}"
    stem = leaf.removesuffix("_orig")
    beside = {f"{stem}_mask", f"{stem}_u"} & set(holder._buffers)
    return f"{prefix}{stem}" if stem != leaf and beside else name


def layer_of(module: nn.Module) -> Layer | None:
    """The row that speaks for a module, or None."""
    for layer in LAYERS.values():
        if isinstance(module, layer.types):
            return layer
    return None


def contracts(module: nn.Module) -> bool:
    """Whether a module sums its inputs over its weight: a linear layer or a
    convolution.
    """
    layer = layer_of(module)
    return layer is not None and layer.channel is not None


def is_plain(module: nn.Module) -> bool:
    """Whether one matrix of a module contracts all its inputs (no groups, not
    transposed).
    """
    layer = layer_of(module)
    return layer is not None and layer.plain(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm of torch's own."""
    layer = layer_of(module)
    return layer is not None and layer.normalised is not None


def channel_of(module: nn.Module, tensor: Tensor) -> int:
    """The dimension of a layer's input or output that holds the units."""
    layer = layer_of(module)
    assert layer is not None
    assert layer.channel is not None
    return layer.channel(tensor.dim())
