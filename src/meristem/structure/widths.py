"""From the labels of a traced model to the axes that count units: widths, heads, ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import nn

from meristem.core.axis import Axis, Fill, Place, Role, Slot
from meristem.structure.chains import CHAIN
from meristem.structure.labels import COMPLEX, SPATIAL, Label, atoms
from meristem.structure.layers import weight_name
from meristem.structure.tracer import Norm, Trace
from meristem.structure.twin import named_tensors, submodule

Part = Literal["", "heads", "kv_heads", "head_dim", "groups", "in", "vocabulary"]
"""What of a module's output an axis counts; "" counts the output units themselves.

Where several queries share a key, "kv_heads" counts keys with all their queries, and
"heads" the queries of each key.
"""
INPUT = "an input of the model"


class Widths:
    """The unit axes of a traced model.

    Attributes:
        axes, ends: The axes by name; the classes and the vocabulary apart.
        frozen: What cannot grow, with the reason.
        atoms: The label that each of them changes.
        norms: The layer and RMS norms over each of them.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, labels: dict[str, list[Label]]
    ) -> None:
        self._model, self._trace, self._labels = model, trace, labels
        self._tensors = named_tensors(model)
        self._consumed = set(self._of_parameters(trace.consumed))
        self._produced = set(self._of_parameters(trace.produced))
        self.axes: dict[str, Axis] = {}
        self.ends: dict[str, Axis] = {}
        self.frozen: dict[str, str] = {}
        self.atoms: dict[str, Label] = {}
        self.norms: dict[str, list[Norm]] = {}
        self._taken: set[str] = set()
        self._places: dict[Label, list[Place]] = {}
        self._norms_of: dict[Label, list[Norm]] = {}
        for norm in trace.norms:
            for atom in dict.fromkeys(atoms(norm.label)):
                self._norms_of.setdefault(atom, []).append(norm)
        self._norm_words = {norm.reason for norm in trace.norms}
        self._batch_normed = _all_atoms(trace.batch_norms)
        self._grouped = _all_atoms(list(trace.groups.values()))
        self._heads = self._numbering_heads()
        self._collect()

    def _of_parameters(
        self, places: Iterable[tuple[str, int]]
    ) -> Iterator[tuple[str, int]]:
        """Those of parameters: a buffer neither makes units nor reads them."""
        for name, dim in places:
            if isinstance(self._tensors[name], nn.Parameter):
                yield name, dim

    def _collect(self) -> None:
        # One atom may stand in many tensors: all of them follow it.
        found: dict[Label, list[Place]] = {}
        for name, labels in self._labels.items():
            for d, label in enumerate(labels):
                for atom in dict.fromkeys(atoms(label)):
                    found.setdefault(atom, []).append(Place(name, d))
        self._places = found
        owners = {atom: self._owner(places) for atom, places in found.items()}
        for atom in sorted(found, key=lambda atom: self._when(owners[atom])):
            self._add(atom, owners[atom], found[atom])

    def _add(self, atom: Label, owner: Place, places: list[Place]) -> None:
        label = self._labels[owner.name][owner.dim]
        part = self._part(atom, owner, label)
        reason = self._reason(atom, places)
        name = self._name(part, owner)
        if reason is not None:
            # Kernel sizes and pairs of real and imaginary parts are no units; nobody
            # looks for them in the table.
            is_space = atom.frozen == SPATIAL and self._role(owner) != "fan_in"
            if atom.size > 1 and not is_space and atom.frozen != COMPLEX:
                self.frozen[name] = reason
                self._taken.add(name)
            return
        self._taken.add(name)
        axis = self._axis(name, part, atom, label, places)
        self.atoms[name] = atom
        self.norms[name] = self._norms_of.get(atom, [])
        if axis.end:
            self.ends[name] = axis
        else:
            self.axes[name] = axis

    def _when(self, place: Place) -> int:
        """When the forward first read a tensor."""
        return self._trace.order.get(place.name, len(self._trace.order))

    def _owner(self, places: Sequence[Place]) -> Place:
        """The place that names an axis: its first producer, else its first place."""

        def rank(place: Place) -> tuple[bool, int]:
            return tuple(place) not in self._produced, self._when(place)

        return min(places, key=rank)

    def _role(self, place: Place) -> Role:
        if tuple(place) in self._consumed:
            return "fan_out"
        return "fan_in" if tuple(place) in self._produced else "carried"

    def _tied(self, place: Place) -> bool:
        key = tuple(place)
        return key in self._consumed and key in self._produced

    def _part(self, atom: Label, owner: Place, label: Label) -> Part:
        """What of its owner's dimension an atom counts."""
        if atom.end == "vocabulary":
            return "vocabulary"
        inside = list(atoms(label))
        if atom in self._heads:
            beside = [other for other in inside if other in self._heads]
            # Keys stand in the weights of keys, values and queries.
            fewest = min(len(self._places[other]) for other in beside)
            return "kv_heads" if len(self._places[atom]) > fewest else "heads"
        # Queries, keys and values in one weight are picked by index; there are three.
        if any(other in self._heads for other in inside) and atom.frozen is None:
            return "head_dim"
        growable = {other for other in inside if self._reason(other, []) is None}
        if len(growable) > 1 and atom in self._grouped:
            return "groups"
        reads = self._role(owner) == "fan_out" and not self._tied(owner)
        return "in" if reads else ""

    def _name(self, part: Part, owner: Place) -> str:
        name = self._module_name(owner)
        reads = self._role(owner) == "fan_out" and not self._tied(owner)
        if reads and part not in ("in", "vocabulary"):
            name = f"{name}:in"
        if part:
            name = f"{name}:{part}"
        base, number = name, 2
        while name in self._taken:
            name, number = f"{base}:{number}", number + 1
        return name

    def _module_name(self, owner: Place) -> str:
        """The module that holds a weight, else the parameter's own name."""
        known_as = weight_name(self._model, owner.name)
        module_name, _, leaf = known_as.rpartition(".")
        module = submodule(self._model, module_name)
        if module_name and isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return module_name
        has_parts = bool(set(module._modules) - {"parametrizations"})
        if not module_name or leaf != "weight" or has_parts:
            return owner.name
        outer, _, key = module_name.rpartition(".")
        holder = submodule(self._model, outer)
        chain = getattr(holder, CHAIN, None) if outer else None
        if chain is None:
            return module_name
        # A layer that has been lengthened keeps the name that it had before.
        keys = list(holder._modules)
        old = keys[0] if chain == "after" else keys[-1]
        return outer if key == old else module_name

    def _numbering_heads(self) -> set[Label]:
        """Atoms that number the heads of an attention.

        They are batch dimensions of its products, inside a parameter's dimension.
        """
        inside: set[Label] = set()
        for labels in self._labels.values():
            for label in labels:
                if label.root.is_product:
                    inside.update(atoms(label))
        return inside & _all_atoms(list(self._trace.heads))

    def _reason(self, atom: Label, places: Sequence[Place]) -> str | None:
        """Why an atom cannot grow, or None. Without places, only the atom is judged."""
        if atom.frozen is not None:
            return atom.frozen
        if atom.end == "input" and (not places or atom.mixes):
            return INPUT
        # More classes may change the loss that a forward gives, see `Trace.excused`.
        excused = self._trace.excused if atom.end is not None else set()
        mixes = atom.mixes - excused
        others = sorted(mixes - self._norm_words)
        if others:
            return others[0]
        norms = self._norms_of.get(atom, [])
        if mixes and len({norm.kind for norm in norms}) != 1:
            return "layer norms and RMS norms both normalise over it"
        if not places:
            return None
        return self._reason_of_roles(atom, places)

    def _reason_of_roles(self, atom: Label, places: Sequence[Place]) -> str | None:
        # What an axis can do depends on which sides of it there are.
        roles = {self._role(place) for place in places}
        if atom.end == "output" and roles == {"fan_out"}:
            return "an output that no parameter produces"
        if atom.end == "input" and ("fan_in" in roles or "fan_out" not in roles):
            return INPUT
        if atom.end is not None:
            return None
        if "fan_out" not in roles:
            seen = any(place.name in self._trace.order for place in places)
            if seen:
                return "nothing that grows reads it"
            return (
                "the forward on the example does not use it. hint: pass an example on "
                "which it is used"
            )
        if "fan_in" in roles:
            return None
        if not any(self._tied(place) for place in places):
            return "no weight produces it"
        # In a normalised stream the rule of the stream keeps a unit alive, not a bias.
        streamed = bool(atom.mixes)
        if not streamed and not self._has_bias(places):
            return "its weight is tied on both sides and no bias would keep a new unit alive"
        return None

    def _has_bias(self, places: Sequence[Place]) -> bool:
        fills = self._trace.fills
        return any(fills.get(place.name) == "bias" for place in places)

    def _axis(
        self, name: str, part: Part, atom: Label, label: Label, places: list[Place]
    ) -> Axis:
        multiple = 1
        # An axis of output units counts these, however the dimension is viewed; heads,
        # groups and the rest count themselves.
        if part == "" and label.root.is_product:
            multiple = label.root.size // atom.size
        slots = tuple(self._slot(place) for place in sorted(places, key=self._when))
        norms = self._norms_of.get(atom, [])
        norm: str | None = norms[0].kind if norms else None
        if norm is None and atom in self._batch_normed:
            norm = "batch_norm"
        return Axis(
            name,
            "heads" if part in ("heads", "kv_heads") else "width",
            atom.size * multiple,
            multiple,
            slots,
            norm,
            atom.end,
            multiple,
        )

    def _fill_beside(self, place: Place, fill: Fill) -> Fill:
        """How new entries of a buffer start: nothing of what reads the units is masked,
        nothing is added to it.
        """
        if place.name.endswith("_mask"):
            return "one"
        read = tuple(place) in self._trace.consumed | self._trace.produced
        return "zero" if read and fill == "mean" else fill

    def _slot(self, place: Place) -> Slot:
        tensor = self._tensors[place.name]
        role = self._role(place)
        # A matrix is drawn like its layer; a vector that is no bias is a scale.
        buffer = not isinstance(tensor, nn.Parameter)
        drawn = not buffer and (tensor.dim() > 1 or role == "fan_in")
        fill = self._trace.fills.get(place.name, "draw" if drawn else "mean")
        if buffer:
            fill = self._fill_beside(place, fill)
        return Slot(place.name, place.dim, role, fill, buffer, self._tied(place))


def _all_atoms(labels: Sequence[Label]) -> set[Label]:
    return {atom for label in labels for atom in atoms(label)}
