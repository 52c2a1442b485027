"""Expand a pretrained model: every layer alike, the function kept, the config following."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meristem.core.axis import Slot
from meristem.core.change import Plan
from meristem.core.errors import DataError, GrowthRefused
from meristem.core.growth import Growth
from meristem.core.offer import Offer
from meristem.event.steps import (
    Event,
    Methods,
    Optimizers,
    accepted,
    all_or_nothing,
    cares,
    carry_out,
    methods,
    prepare,
    private_generator,
    propose,
)
from meristem.growing import planned_for
from meristem.how import Interpose, Random, ZeroBlock
from meristem.lab.laboratory import Loan
from meristem.pretrained.words import counts
from meristem.structure import with_mirrors
from meristem.structure.configs import said_by_config
from meristem.structure.kinds import apart
from meristem.structure.planning import with_insertions
from meristem.structure.undisturbed import undisturbed
from meristem.surgery.host import inner, opened_host, ranks_of

At = Literal["even", "middle", "end"] | Sequence[int]
SPREAD = 0.1
"""Of new rows around the mean of the old ones, as a part of the spread of these."""
TOKENS = 12
"""Of the call on which a model is looked at, where none is given."""


def expand_(
    model: nn.Module,
    to: str,
    example: Any = None,
    how: Methods = None,
    *,
    at: At = "even",
    vectors: Mapping[str, Tensor] | None = None,
    optimizer: Optimizers = None,
    generator: torch.Generator | None = None,
) -> Growth:
    """Grow all layers of a pretrained model alike, in place, all or nothing.

    The outputs stay what they are, and a config that is saved with the model says its
    new sizes: `save_pretrained` and `from_pretrained` give it back.

    Args:
        model: Any module that runs; where it has a config, one that is built from it.
        to: What grows, as "depth=+4,mlp=x1.5,heads=+2,width=x1.25,vocabulary=+128,
            classes=+3": "+4" more, "x1.5" times as many, or the size itself. The words
            are `mlp`, `heads`, `kv_heads`, `width`, `depth`, `vocabulary`, `classes`
            and `lora_rank`.
        example: A tensor, a tuple of arguments or a dict of keyword arguments; by
            default a call that fits the model's main input.
        how: The method, or several; by default random fan-in and zero fan-out for
            widths, silent copies (Interpose, as LLaMA-Pro) for blocks, and the mean of
            the old rows with a small spread for words and classes.
        at: Where new blocks stand: spread "even", in the "middle", at the "end" with
            fresh weights, or how many of the present blocks stand before each:
            [8, 16, 24].
        vectors: By parameter the new rows of words or classes, where they are known:
            {"lm_head.weight": tensor of (new rows, present width)}; where the head is
            tied, under the name of the embedding.
        optimizer: The optimizer, or all of them, whose state follows.
        generator: The source of randomness; by default a private one of this model.

    Returns:
        What was done; `growth.blocks` and `growth.rows` tell what is new.

    Raises:
        GrowthRefused: A word means nothing here, the model cannot follow, or its config
            cannot say the sizes. Nothing has changed then.

    Examples:
        >>> import torch, meristem as ms
        >>> layer = torch.nn.TransformerEncoderLayer(
        ...     8, 2, 16, batch_first=True, norm_first=True
        ... )
        >>> net = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        >>> growth = ms.expand_(net, "depth=+2,mlp=x1.5", torch.randn(3, 5, 8))
        >>> growth.blocks, net.layers[0].linear1.out_features, growth.max_change < 1e-6
        ({'layers': [2, 5]}, 24, True)
    """
    chosen = methods_for(how, at)
    ranks = ranks_of(model)
    if generator is None:
        generator = private_generator(inner(model))
    with opened_host(model) as held, ranks.together(), all_or_nothing(generator):
        ranks.begin(held, generator)
        call = example if example is not None else example_of(held)
        loan = Loan(generator, ranks=ranks)
        event = prepare(held, call, loan, chosen, cares(None, optimizer), optimizer)
        plan = _expansion(event, to, at)
        return carry_out(
            event, plan, _ends(event, plan, {} if vectors is None else vectors)
        )


def expansion(
    model: nn.Module, to: str, example: Any = None, how: Methods = None, at: At = "even"
) -> Plan:
    """The dry run of `expand_`: every shape and number that would change.

    Raises:
        GrowthRefused: As `expand_`.
    """
    held = inner(model)
    generator = torch.Generator()
    with all_or_nothing(generator):
        call = example if example is not None else example_of(held)
        event = prepare(held, call, Loan(generator), methods_for(how, at))
        return _expansion(event, to, at)


def methods_for(how: Methods, at: At) -> tuple[Any, ...]:
    """The methods of an expansion: those given, then one that puts blocks in their
    places, and one for widths.
    """
    given = methods(how)
    if at != "even" and any("depth" in one.kinds for one in given):
        raise ValueError(
            "at= places silent copies, and the given method places its blocks itself. "
            "hint: pass one of the two"
        )
    deepening: Any = ZeroBlock()
    if at in ("even", "middle"):
        deepening = Interpose(zero=True, behind=at)
    elif at != "end":
        deepening = Interpose(zero=True, behind=[place - 1 for place in _places(at)])
    return (*given, deepening, Random())


def _places(at: Any) -> list[int]:
    """How many blocks stand before each new one, checked."""
    listed = list(at) if isinstance(at, (list, tuple, range)) else []
    whole = all(type(place) is int and place > 0 for place in listed)
    if not listed or not whole or len(set(listed)) < len(listed):
        raise ValueError(
            'at is "even", "middle", "end", or how many of the present blocks stand '
            f"before each new one, as [8, 16, 24]; got {at!r}"
        )
    return listed


def _check_room(plan: Plan, at: At) -> None:
    """Raise unless there is a new block for every place, and a place for every block."""
    if isinstance(at, str):
        return
    for insertion in plan.insertions:
        count = sum(insertion.new)
        if count != len(at) or max(at) > insertion.size:
            raise GrowthRefused(
                f"at={list(at)} names {len(at)} places behind at most {max(at)} blocks; "
                f"{insertion.axis} has {insertion.size} blocks and gets {count} more"
            )


def _expansion(event: Event, to: str, at: At) -> Plan:
    structure = event.structure
    wanted = counts(structure, to, event.how)
    plan = with_mirrors(structure, accepted(planned_for(structure, wanted)))
    _check_room(plan, at)
    _, deep = apart([structure.axes.named(name) for name in plan.after])
    placed = []
    for axis in deep:
        # Where blocks stand does not depend on their widths.
        offer = propose(event, event.lab, axis, plan.added[axis.name])
        assert offer.blocks is not None
        placed.append(offer.blocks.insertion)
    if placed:
        plan = accepted(with_insertions(structure, plan, placed))
    return said_by_config(structure, plan)


def example_of(model: nn.Module) -> dict[str, Tensor]:
    """A call that fits a pretrained model: its main input, or all that it can take.

    Raises:
        DataError: The model does not say what it takes.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    call = _call_of(model, config, [main])
    if call is None:
        raise DataError(
            f"{type(model).__name__} does not say what a call of it looks like. hint: "
            "pass example=, a dict of its arguments"
        )
    named = inspect.signature(model.forward).parameters
    others = [name for name in _INPUTS if name in named and name != main]
    both = _call_of(model, config, [main, *others])
    if others and both is not None and not _runs(model, call):
        return both
    return call


def _call_of(
    model: nn.Module, config: Any, names: Sequence[Any]
) -> dict[str, Tensor] | None:
    """A call with these arguments; None where the config does not give their shapes."""
    if config is None or not _INPUTS.keys() >= set(names):
        return None
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    drawn = torch.Generator().manual_seed(0)
    call = {}
    for name in names:
        made = _INPUTS[name](config, drawn)
        if made is None:
            return None
        call[name] = made.to(device, dtype if made.is_floating_point() else None)
    if getattr(config, "is_encoder_decoder", False):
        tokens = _tokens(config, drawn).to(device)
        length = max(tokens.shape[1] // 2, 1)
        call["decoder_input_ids"] = call.get("input_ids", tokens)[:, :length]
    return call


def _runs(model: nn.Module, call: Mapping[str, Tensor]) -> bool:
    """Whether a model of several inputs takes one alone."""
    try:
        with undisturbed(), torch.no_grad():
            model(**call)
    except Exception:  # of any kind; the call with all inputs is looked at next
        return False
    return True


def _tokens(config: Any, drawn: torch.Generator) -> Tensor:
    text = config.get_text_config()
    length = min(TOKENS, _positions(text))
    return torch.randint(text.vocab_size, (2, length), generator=drawn)


def _pixels(config: Any, drawn: torch.Generator) -> Tensor | None:
    seen = getattr(config, "vision_config", config)
    if not hasattr(seen, "image_size"):
        return None
    side, channels = seen.image_size, getattr(seen, "num_channels", 3)
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return torch.randn(2, channels, *sides, generator=drawn)


def _spectrum(config: Any, drawn: torch.Generator) -> Tensor | None:
    if not hasattr(config, "num_mel_bins"):
        return None
    # Whisper halves the length of what it hears, and wants all of it.
    length = 2 * getattr(config, "max_source_positions", TOKENS)
    return torch.randn(2, config.num_mel_bins, length, generator=drawn)


def _sound(config: Any, drawn: torch.Generator) -> Tensor | None:
    strides = getattr(config, "conv_stride", None)
    if strides is None:
        return None
    return torch.randn(2, TOKENS * math.prod(strides), generator=drawn)


_INPUTS: Mapping[str, Callable[[Any, torch.Generator], Tensor | None]] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_features": _spectrum,
    "input_values": _sound,
}
"""What calls of pretrained models are made of, by the names of the arguments."""


def positions_of(model: nn.Module) -> int:
    """The longest text that a model reads, as far as its config says."""
    config: Any = model.config
    return _positions(config.get_text_config())


def _positions(config: Any) -> int:
    told = getattr(config, "max_position_embeddings", None)
    return told if type(told) is int and told > 0 else TOKENS


def _ends(event: Event, plan: Plan, vectors: Mapping[str, Tensor]) -> dict[str, Offer]:
    """The new rows of words and classes: given, or near the mean of the old ones.

    A word that starts there takes little from the others: its logit is near the mean of
    theirs.

    Raises:
        GrowthRefused: Vectors of another shape, or of what does not grow.
    """
    if not isinstance(vectors, Mapping):
        raise TypeError(
            "vectors is a dict, from parameters to tensors of their new rows; got "
            f"{type(vectors).__name__}"
        )
    offers = {}
    unused = set(vectors)
    for name in plan.after:
        axis = event.structure.axes.named(name)
        if axis.end not in ("vocabulary", "output") or axis.streamed:
            continue
        strips = {}
        for slot in axis.slots:
            if slot.buffer:
                continue
            old = event.lab.units(slot, axis)
            shape = (plan.added[name] * old.shape[0] // axis.size, *old.shape[1:])
            mean = old.mean(0, keepdim=True).expand(shape)
            spread = old.float().std(0, keepdim=True) if len(old) > 1 else 0 * mean
            noise = event.lab.normal(shape, like=old)
            strip = (mean + SPREAD * noise * spread).to(old.dtype)
            if slot.name in vectors:
                strip = _given(vectors[slot.name], strip, slot)
                unused.discard(slot.name)
            strips[slot.place] = strip
        offers[name] = Offer(name, plan.added[name], strips)
    if unused:
        raise GrowthRefused(
            f"vectors names {sorted(unused)[0]}, of which nothing grows here"
        )
    return offers


def _given(vectors: Tensor, strip: Tensor, slot: Slot) -> Tensor:
    """Vectors of a user as a strip, unit by unit."""
    rows = torch.as_tensor(vectors).movedim(slot.dim, 0).unsqueeze(1)
    if rows.shape != strip.shape:
        raise GrowthRefused(
            f"vectors of {slot.name} must hold {strip.shape[0]} rows of shape "
            f"{tuple(strip.shape[2:])}; got {tuple(rows.shape)}"
        )
    return rows.to(device=strip.device, dtype=strip.dtype)
