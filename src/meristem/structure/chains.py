"""Places in a chain where a layer fits, and the identity layers that stand there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meristem.activations import IDENTITIES
from meristem.core.change import Insertion
from meristem.structure.depth import Depth, Form, follows
from meristem.structure.layers import LAYERS, is_plain, layer_of
from meristem.structure.tracer import Pass, Tracer
from meristem.structure.twin import submodule

CHAIN = "_meristem_chain"
"""The attribute of a grown nn.Sequential: where its new layers stand, seen from the old
one.

Its value is "after" or "before".
"""
# An identity behind a layer that widens more than this would dwarf it (a vocabulary).
_WIDENS = 4
# Up to this many units a layer may widen as it likes.
_SMALL = 1024


def find_places(
    model: nn.Module, passes: Sequence[Pass], runs: Sequence[Depth], outputs: set[str]
) -> list[Depth]:
    """The places of a chain, outside of runs.

    They are behind hidden layers, and in front of the layers named in `outputs`.
    """
    times = Counter(one.name for one in passes)
    held = Counter(
        id(module) for _, module in model.named_modules(remove_duplicate=False)
    )
    covered = {block for run in runs for block in run.blocks}
    tied = getattr(model, "_tied_weights_keys", None) or ()
    shared = Counter(
        id(one) for _, one in model.named_parameters(remove_duplicate=False)
    )
    places = []
    for name, module in model.named_modules():
        grown = hasattr(module, CHAIN)  # what has grown inside a block can go again
        if not name or (_is_covered(name, covered) and not grown):
            continue
        # A layer that is called twice, or held in two places, would be lengthened
        # twice.
        if times[name] != 1 or held[id(module)] != 1:
            continue
        # transformers finds tied weights by the names of their modules.
        is_named = any(key.startswith(f"{name}.") for key in tied)
        if is_named and any(shared[id(one)] > 1 for one in module.parameters()):
            continue
        if grown:
            places.append(_grown_place(name, module))
            # What stands inside a grown place is counted there.
            covered.add(name)
        elif _fits(module) and not _inside_torch(model, name):
            form: Form = "before" if name in outputs else "after"
            places.append(Depth(f"{name}:depth", name, form, 0, 1, (name,), False))
    return places


def _is_covered(name: str, covered: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in covered for i in range(1, len(parts)))


def _grown_place(name: str, chain: nn.Module) -> Depth:
    form: Form = getattr(chain, CHAIN)
    keys = list(chain._modules)[::2]  # every other one is an activation
    if not follows(form):
        keys = [keys[-1], *keys[:-1]]
    blocks = tuple(f"{name}.{key}" for key in keys)
    return Depth(f"{name}:depth", name, form, 0, 1, blocks, False)


def _inside_torch(model: nn.Module, name: str) -> bool:
    """Whether torch's own code holds a layer.

    It may read its weight directly, as the fast path of attention does.
    """
    holder = submodule(model, name.rpartition(".")[0])
    if isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return type(holder).__module__.startswith("torch.nn.")


def _fits(module: nn.Module) -> bool:
    """Whether an identity fits behind or before a layer."""
    weight = module._parameters.get("weight")
    # Parametrized layers hold no plain weight.
    if weight is None or weight.dim() < 2 or not is_plain(module):
        return False
    if type(module) not in _SPOKEN_FOR and layer_of(module) is LAYERS["convolution"]:
        return False
    return weight.shape[0] <= max(_SMALL, _WIDENS * weight.shape[1])


_SPOKEN_FOR = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def activation_at(form: Form, passed: Pass, tracer: Tracer) -> str:
    """The activation before a new layer.

    Where a ReLU of the model's own follows (or its output comes in), a second one
    changes nothing; elsewhere it would.
    """
    if follows(form):
        readers = tracer.of(passed.outputs[0]).readers
        return "relu" if readers in (["relu"], ["relu_"]) else "rational"
    return "relu" if tracer.of(passed.inputs[0]).positive else "rational"


def insert_layers(
    model: nn.Module, insertion: Insertion
) -> dict[int, tuple[nn.Module, nn.Module]]:
    """Put the layers of a chain in their places.

    Returns:
        For the place of every new layer, the layer that it was made after, and its
        activation and itself.
    """
    module = submodule(model, insertion.path)
    parts = list(module.children()) if hasattr(module, CHAIN) else [module]
    if follows(insertion.form):
        old = parts[0]
        pairs = list(zip(parts[1::2], parts[2::2], strict=True))
    else:
        old = parts[-1]
        pairs = list(zip(parts[1::2], parts[:-1:2], strict=True))
    made: dict[int, tuple[nn.Module, nn.Module]] = {}
    placed: list[tuple[nn.Module, nn.Module]] = []
    for place, number in enumerate(insertion.blocks):
        if insertion.new[place]:
            parent = pairs[number - 1][1] if number else old
            layer = identity_layer(parent, follows(insertion.form))
            activation = _activation(insertion.activation, layer, parent)
            made[place] = (parent, nn.ModuleList([activation, layer]))
            placed.append((activation, layer))
        elif number:
            placed.append(pairs[number - 1])
    _stand(model, insertion, module, old, placed)
    return made


def _stand(
    model: nn.Module,
    insertion: Insertion,
    present: nn.Module,
    old: nn.Module,
    placed: Sequence[tuple[nn.Module, nn.Module]],
) -> None:
    """Put the old layer and those placed beside it where the present module stands."""
    holder_name, _, key = insertion.path.rpartition(".")
    holder = submodule(model, holder_name)
    if not placed:
        holder._modules[key] = old
        return
    order = [old]
    if follows(insertion.form):
        for activation, layer in placed:
            order += [activation, layer]
    else:
        order = []
        for activation, layer in placed:
            order += [layer, activation]
        order.append(old)
    # The Sequential that an earlier growth made is used again.
    chain = present
    if not hasattr(present, CHAIN):
        chain = nn.Sequential().train(old.training)
    chain._modules.clear()
    for number, module in enumerate(order):
        chain._modules[str(number)] = module
    setattr(chain, CHAIN, insertion.form)
    holder._modules[key] = chain


def identity_layer(old: nn.Module, behind: bool) -> nn.Module:
    """A layer like `old` that starts as the identity.

    It passes on what `old` gives, or (in front of it) what it takes.
    """
    weight = old.weight
    assert isinstance(weight, Tensor)
    row = layer_of(old)
    assert row is not None
    assert row.identity is not None
    layer = row.identity(old, weight.shape[0 if behind else 1])
    for name, parameter in list(layer.named_parameters()):
        start = weight.detach().new_zeros(parameter.shape)
        if name == "weight" and not has_no_data(weight):
            # dirac_ is the identity of convolutions.
            fill = nn.init.eye_ if start.dim() == 2 else nn.init.dirac_
            fill(start)
        trained = nn.Parameter(start, requires_grad=weight.requires_grad)
        setattr(layer, name, trained)
    return layer.train(old.training)


def _activation(kind: str, layer: nn.Module, old: nn.Module) -> nn.Module:
    if kind == "relu":
        return nn.ReLU().train(old.training)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    row = layer_of(layer)
    assert row is not None
    assert row.channel is not None
    # Counted from the end, so that inputs without a batch dimension pass, too.
    rank = weight.dim()
    module = IDENTITIES[kind](weight.shape[0], dim=row.channel(rank) - rank)
    for name, parameter in list(module.named_parameters()):
        start = parameter.detach().to(weight.dtype)
        if has_no_data(weight):
            start = weight.detach().new_zeros(start.shape)
        else:
            start = start.to(weight.device)
        trained = nn.Parameter(start, requires_grad=weight.requires_grad)
        setattr(module, name, trained)
    return module.train(old.training)


def has_no_data(tensor: Tensor) -> bool:
    """Whether a tensor is a fake, or on the meta device."""
    fake = torch._subclasses.fake_tensor.FakeTensor
    return isinstance(tensor, fake) or tensor.is_meta
