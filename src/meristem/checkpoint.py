"""Checkpoints that know their shape: lineage, weights and training state in one folder,
replaced atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from meristem.core.errors import CheckpointError, OptimizerError
from meristem.core.growth import LINEAGE
from meristem.core.ranks import Ranks
from meristem.event.steps import Optimizers, optimizers, private_generator
from meristem.grower import Grower
from meristem.surgery.aftercare import aftercare_state, load_aftercare
from meristem.surgery.exchange import check_free
from meristem.surgery.host import inner, opened_host, ranks_of
from meristem.surgery.lineage import Line, members, rebuild, replay
from meristem.surgery.regrow import changing, left, missing, replayed

MANIFEST = "meristem.json"
FORMAT = 2
"""Of checkpoints; another one is refused."""
_FIELDS = {"class", "weights", "training", "sha256", "lineage"}
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

    Raises:
        CheckpointError: The files cannot be written, as on a full disk; the checkpoint
            before is as it was.

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
    folder = _folder(path)
    model = inner(model)
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid4().hex[:12]
    # New names every time, so that a kill never tears a file that is in use.
    weights, training = f"weights-{token}.safetensors", f"training-{token}.pt"
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
    draft = folder / f"{MANIFEST}.{token}"
    with _whole_or_none(folder / weights, folder / training, draft):
        save_file(_unshared(model), folder / weights)
        torch.save(state, folder / training)
        sums = {name: _checksum(folder / name) for name in (weights, training)}
        manifest = {
            "format": FORMAT,
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "weights": weights,
            "training": training,
            "sha256": sums,
            "lineage": getattr(model, LINEAGE, []),
        }
        draft.write_text(json.dumps(manifest, indent=1))
        # The one moment that counts: before it the old files are named, after it the
        # new.
        os.replace(draft, folder / MANIFEST)
    for stale in [
        *folder.glob("weights-*.safetensors"),
        *folder.glob("training-*.pt"),
        *folder.glob(f"{MANIFEST}.*"),
    ]:
        if stale.name not in (weights, training):
            stale.unlink(missing_ok=True)


@contextmanager
def _whole_or_none(*files: Path) -> Iterator[None]:
    """Within, files are written; where one cannot be, none of them stays."""
    try:
        yield
    except BaseException as error:
        for file in files:
            file.unlink(missing_ok=True)
        # What torch and safetensors make of a full disk is no OSError.
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise CheckpointError(
                f"{files[0].parent}: the checkpoint could not be written ({error}); the "
                "one before it, if any, is as it was"
            ) from error
        raise


def _folder(path: object) -> Path:
    if isinstance(path, nn.Module):
        raise TypeError("the folder comes first, then the model: (path, model)")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a folder; got {type(path).__name__}")
    return Path(path)


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
    folder, ranks = _folder(path), ranks_of(model)
    with opened_host(model) as held:
        _load(folder, held, optimizers(optimizer), grower, ranks)
    return model


def _load(
    folder: Path,
    model: nn.Module,
    given: Sequence[Optimizer],
    grower: Grower | None,
    ranks: Ranks,
) -> None:
    with ranks.together():
        manifest = _manifest(folder)
        _check_class(manifest, model)
        weights = _read(folder, manifest, "weights", load_file)
        state = _training_state(folder, manifest)
        line = manifest["lineage"]
        targets = model.state_dict(keep_vars=True)
        growths = missing(model, line, targets, weights)
        _check(model, growths, weights, given, state, grower)
        # Nothing may hold the tensors that the growths will exchange.
        check_free(changing(growths, targets), model)
        # A file may be damaged where one process reads it alone.
        ranks.gather(manifest["sha256"])
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


def regrow_(model: Model, line: Line, *, optimizer: Optimizers = None) -> Model:
    """Give a freshly built model the shapes of a grown one, so that anybody's
    `load_state_dict` fits it.

    New entries are zero until weights are loaded. The parameters of new blocks join the
    groups of those that they were made after, in the order of the model: the positional
    state of an optimizer fits, too.

    Args:
        model: A model as it was built before it grew, or at its grown size.
        line: `meristem.lineage` of the grown model.
        optimizer: Optimizers over the model's parameters that have not stepped yet.

    Returns:
        `model`.

    Raises:
        CheckpointError: The lineage does not fit the model. Nothing has changed then.
        OptimizerError: An optimizer has state already.

    Examples:
        >>> import torch, meristem as ms
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> net = make()
        >>> _ = ms.grow_(net, {"0": 2}, torch.randn(3, 4))
        >>> kept = {"model": net.state_dict(), "lineage": ms.lineage(net)}
        >>> again = ms.regrow_(make(), kept["lineage"])
        >>> again.load_state_dict(kept["model"])
        <All keys matched successfully>
    """
    given = optimizers(optimizer)
    growths = left(inner(model), line)
    if not growths:
        return model
    for one in given:
        if any(float(state.get("step", 1)) > 0 for state in one.state.values()):
            raise OptimizerError(
                f"the {type(one).__name__} has stepped already: regrow_ takes a fresh "
                "one, whose state is loaded afterwards"
            )
    with opened_host(model) as held:
        replayed(held, growths)
        named = {id(p): name for name, p in held.named_parameters()}
        targets = held.state_dict(keep_vars=True)
        check_free(changing(growths, targets), held)
        groups = []
        others: dict[str, nn.Parameter] = {}
        for one in given:
            for group in one.param_groups:
                olds = []
                for p in group["params"]:
                    # What is not the model's stays where it is.
                    name = named.get(id(p), f"beside {id(p)}")
                    olds.append(name)
                    others[name] = p
                groups.append((group, members(olds, growths)))
        replay(held, growths)
        live = dict(held.named_parameters())
        for group, names in groups:
            group["params"][:] = [live.get(name, others.get(name)) for name in names]
            if "param_names" in group:
                group["param_names"] = names
        held.__dict__[LINEAGE] = json.loads(json.dumps(line))
    return model


def _training_state(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    def read(path: Path) -> Any:
        return torch.load(path, weights_only=True, map_location="cpu")

    state: dict[str, Any] = _read(folder, manifest, "training", read)
    return state


def _read(
    folder: Path, manifest: dict[str, Any], what: str, read: Callable[[Path], Any]
) -> Any:
    """A file of a checkpoint, once it is known to be whole.

    Raises:
        CheckpointError: It is missing, or not what was written.
    """
    path = folder / manifest[what]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. hint: load an earlier checkpoint")
    if _checksum(path) != manifest["sha256"].get(path.name):
        raise CheckpointError(
            f"{path} is damaged: its checksum is not the one that was written down. "
            "hint: load an earlier checkpoint"
        )
    return read(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_class(manifest: dict[str, Any], model: nn.Module) -> None:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    # A script is another module each time that it is run or imported.
    if manifest["class"].rpartition(".")[2] != kind.rpartition(".")[2]:
        raise CheckpointError(
            f"the checkpoint does not belong to this {type(model).__name__}: a "
            f"{manifest['class']} was saved. hint: build the model by that class"
        )


def _check(
    model: nn.Module,
    growths: Line,
    weights: dict[str, Tensor],
    given: Sequence[Optimizer],
    state: dict[str, Any],
    grower: Grower | None,
) -> None:
    """Raise unless all of a checkpoint fits; nothing has changed then.

    What the model will be like is tried on a copy without data.
    """
    kind = type(model).__name__
    grown, followed = replayed(model, growths)
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
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is not readable: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} is not of format {FORMAT}, the one that this version "
            "reads. hint: load it with the version of Meristem that wrote it"
        )
    absent = _FIELDS - manifest.keys()
    if absent:
        raise CheckpointError(
            f"{folder / MANIFEST} is damaged: {', '.join(sorted(absent))} is missing"
        )
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
