"""Checkpoints that know their shape: lineage, weights and training state in one folder,
replaced atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.core.errors import CheckpointError
from meristem.core.growth import LINEAGE
from meristem.event.steps import Optimizers, optimizers, private_generator
from meristem.grower import Grower
from meristem.structure.twin import twin
from meristem.surgery.aftercare import aftercare_state, load_aftercare
from meristem.surgery.exchange import check_free
from meristem.surgery.host import inner, opened_host
from meristem.surgery.lineage import rebuild, replay

MANIFEST = "meristem.json"
Model = TypeVar("Model", bound=nn.Module)


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizers = None,
    grower: Grower | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write model, optimizer and grower to a folder; a kill at any moment leaves the
    previous checkpoint loadable.

    The weights are a safetensors file, the training state is read with
    `weights_only=True`, and a manifest, replaced last, names both and lists the
    growths.

    Args:
        path: A folder; made where it does not exist.
        model: What to save, grown or not.
        optimizer: Its optimizer, or a list of them.
        grower: Its grower.
        extra: More state of your own (a scheduler's), of tensors and plain types;
            `load_extra` gives it back.

    Examples:
        >>> import tempfile, torch, meristem as ms
        >>> make = lambda: torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> net = make(); folder = tempfile.mkdtemp()
        >>> _ = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> ms.save(folder, net)
        >>> ms.load(folder, make())[0].out_features
        10
    """
    model = inner(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid4().hex[:12]
    # New names every time, so that a kill never tears a file that is in use.
    weights, training = f"weights-{token}.safetensors", f"training-{token}.pt"
    save_file(_unshared(model), folder / weights)
    state = {
        "optimizers": [
            {
                "kind": type(one).__name__,
                "state": one.state_dict(),
                "names": _group_names(one, model),
            }
            for one in optimizers(optimizer)
        ],
        "grower": grower.state_dict() if grower is not None else None,
        "generator": private_generator(model).get_state(),
        "aftercare": aftercare_state(model, optimizers(optimizer)),
        "extra": extra,
    }
    torch.save(state, folder / training)
    manifest = {
        "format": 1,
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "weights": weights,
        "training": training,
        "lineage": getattr(model, LINEAGE, []),
    }
    draft = folder / f"{MANIFEST}.{token}"
    draft.write_text(json.dumps(manifest, indent=1))
    # The one moment that counts: before it the old files are named, after it the new.
    os.replace(draft, folder / MANIFEST)
    for stale in [
        *folder.glob("weights-*.safetensors"),
        *folder.glob("training-*.pt"),
        *folder.glob(f"{MANIFEST}.*"),
    ]:
        if stale.name not in (weights, training):
            stale.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    model: Model,
    *,
    optimizer: Optimizers = None,
    grower: Grower | None = None,
) -> Model:
    """Rebuild a grown model from a freshly built one, and load weights and training
    state into it, in place.

    Args:
        path: The folder that `save` wrote.
        model: A new instance of the saved model's class, at its original or at its
            grown size.
        optimizer: An optimizer over `model`'s parameters, or the same list of them as
            was saved.
        grower: A grower over `model`.

    Returns:
        `model`, grown.

    Raises:
        CheckpointError: The folder holds no checkpoint, or the checkpoint does not fit
            the model or optimizer. The model is then unchanged.
    """
    with opened_host(model) as held:
        _load(Path(path), held, optimizers(optimizer), grower)
    return model


def _load(
    folder: Path,
    model: nn.Module,
    given: Sequence[Optimizer],
    grower: Grower | None,
) -> None:
    manifest = _manifest(folder)
    weights = load_file(folder / manifest["weights"])
    state = _training_state(folder, manifest)
    line = manifest["lineage"]
    targets = model.state_dict(keep_vars=True)
    growths = _missing(model, line, targets, weights)
    _check(model, growths, weights, given, state, grower)
    # Nothing may hold the tensors that the growths will exchange.
    changing = {}
    for growth in growths:
        for entry in growth["tensors"]:
            if entry["name"] in targets:
                changing[entry["name"]] = targets[entry["name"]]
    check_free(changing, model)
    rebuild(model, weights, growths, line)
    live = dict(model.named_parameters())
    for one, saved in zip(given, state["optimizers"], strict=False):
        for group, listed in zip(one.param_groups, saved["names"], strict=True):
            # Positional state belongs to the order in which it was saved.
            group["params"][:] = [live[name] for name in listed]
        one.load_state_dict(saved["state"])
    private_generator(model).set_state(state["generator"])
    load_aftercare(model, given, state["aftercare"])
    if grower is not None:
        grower.load_state_dict(state["grower"])


def _training_state(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    path = folder / manifest["training"]
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def _check(
    model: nn.Module,
    growths: list[Any],
    weights: dict[str, Tensor],
    given: Sequence[Optimizer],
    state: dict[str, Any],
    grower: Grower | None,
) -> None:
    """Raise unless all of a checkpoint fits; nothing has changed then.

    What the model will be like is tried on a copy without data.
    """
    kind = type(model).__name__
    grown = twin(model, lambda _, tensor: tensor.detach().to("meta"))
    followed = {}
    pairs = zip(model.parameters(), grown.parameters(), strict=True)
    for parameter, copied in pairs:
        followed[id(parameter)] = copied
    _replay(grown, growths, kind)
    have = grown.state_dict(keep_vars=True)
    _check_names(set(have), set(weights), kind)
    _check_shapes(have, weights, kind)
    _check_state(given, state, grower)
    names = {id(copied): name for name, copied in grown.named_parameters()}
    will_be = {}
    for key, copied in followed.items():
        if id(copied) in names:
            will_be[key] = names[id(copied)]
    for one, saved in zip(given, state["optimizers"], strict=False):
        _check_groups(one, saved, will_be, followed)


def load_extra(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The `extra` state of a checkpoint."""
    folder = Path(path)
    state = _training_state(folder, _manifest(folder))
    extra: dict[str, Any] | None = state["extra"]
    return extra


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({MANIFEST} is missing)"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not readable: {error}") from None
    return manifest


def _group_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """The parameters of each group by name, in their order: blocks that grow later
    stand behind the others.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    foreign = sum(
        id(p) not in names for group in optimizer.param_groups for p in group["params"]
    )
    if foreign:
        raise CheckpointError(
            f"the {type(optimizer).__name__} holds {foreign} parameters that are not "
            "the model's. hint: save a module that contains everything the optimizer "
            "trains"
        )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _missing(
    model: nn.Module,
    lineage: list[Any],
    have: dict[str, Tensor],
    saved: dict[str, Tensor],
) -> list[Any]:
    """The growths that a model has not had yet: none of its own, or the first ones of
    the checkpoint's.

    A model that was built at its grown size only lacks the attributes that no
    constructor knows (an eps).
    """
    own = json.loads(json.dumps(getattr(model, LINEAGE, [])))
    # A model that has had the first growths lacks only the later ones.
    if own and own == lineage[: len(own)]:
        return lineage[len(own) :]
    if have.keys() != saved.keys() or any(
        have[name].shape != saved[name].shape for name in have
    ):
        return lineage
    held = {name for name, _ in model.named_modules()}
    missing = []
    for growth in lineage:
        entry: dict[str, Any] = {"tensors": [], "insertions": []}
        for key in ("attributes", "counts"):
            entry[key] = [edit for edit in growth[key] if edit[0] in held]
        missing.append(entry)
    return missing


def _replay(grown: nn.Module, growths: list[Any], kind: str) -> None:
    try:
        replay(grown, growths)
    except (AttributeError, IndexError, KeyError, StopIteration) as error:
        raise CheckpointError(
            f"the checkpoint does not belong to this {kind}: its growths cannot be "
            f"repeated on it ({error})"
        ) from error


def _check_shapes(have: dict[str, Tensor], saved: dict[str, Tensor], kind: str) -> None:
    """Raise unless the growths explain every difference of shape."""
    for name, tensor in have.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint does not belong to this {kind}: {name} was saved as "
                f"{tuple(saved[name].shape)}, here it is {tuple(tensor.shape)}, and no "
                "growth of the checkpoint explains that"
            )


def _check_state(
    given: Sequence[Optimizer], state: dict[str, Any], grower: Grower | None
) -> None:
    if given and len(given) != len(state["optimizers"]):
        raise CheckpointError(
            f"{len(state['optimizers'])} optimizers were saved; got {len(given)}"
        )
    if grower is not None and state["grower"] is None:
        raise CheckpointError("no grower was saved in this checkpoint")


def _check_groups(
    optimizer: Optimizer,
    saved: dict[str, Any],
    names: dict[int, str],
    known: Container[int],
) -> None:
    """Raise unless the optimizer's groups hold the parameters that were saved, apart
    from those that growth has added.

    `names` are those that the parameters of the freshly built model will have; the
    dropped ones of `known` have none.
    """
    old = set(names.values())
    sizes = [len(listed) for listed in saved["names"]]
    fits = saved["kind"] == type(optimizer).__name__ and len(sizes) == len(
        optimizer.param_groups
    )
    for group, listed in zip(optimizer.param_groups, saved["names"], strict=False):
        fits &= all(id(p) in known for p in group["params"])
        fits &= {names[id(p)] for p in group["params"] if id(p) in names} == {
            name for name in listed if name in old
        }
    if not fits:
        raise CheckpointError(
            f"a {saved['kind']} over parameter groups of sizes {sizes} was saved; got "
            f"a {type(optimizer).__name__} over "
            f"{[len(group['params']) for group in optimizer.param_groups]}, or over "
            "other parameters"
        )


def _check_names(have: set[str], saved: set[str], kind: str) -> None:
    if have != saved:
        odd = sorted(have ^ saved)
        raise CheckpointError(
            f"the checkpoint does not belong to this {kind}: "
            f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''} "
            f"{'is' if len(odd) == 1 else 'are'} on one side only"
        )


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """Every entry of the state dict in memory of its own; tied tensors are written
    under each of their names.
    """
    return {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
    }
