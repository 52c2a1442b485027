"""Upper limits of a grown net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real


@dataclass(frozen=True)
class Budget:
    """Upper limits of a grown net; a binding limit grows what still fits.

    Args:
        parameters: Trainable and frozen parameters of the whole model.
        flops: Floating-point operations of one forward pass, per example.
        units: Sum of the sizes of all widths.
        growths: Number of growths.
        sizes: Largest size by axis name.

    Examples:
        >>> Budget(parameters=500_000, sizes={"fc1": 256})
        Budget(parameters=500000, flops=None, units=None, growths=None, sizes={'fc1': 256})
    """

    parameters: int | None = None
    flops: int | None = None
    units: int | None = None
    growths: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("parameters", "flops", "units", "growths"):
            value = getattr(self, name)
            if value is not None and not _counts(value):
                raise ValueError(
                    f"Budget({name}=...) must be a number in [1, inf); got {value!r}"
                )
        for axis, size in self.sizes.items():
            if not _counts(size):
                raise ValueError(
                    f"Budget(sizes={{{axis!r}: ...}}) must be a number in [1, inf); got "
                    f"{size!r}"
                )
        whole = {axis: int(size) for axis, size in self.sizes.items()}
        object.__setattr__(self, "sizes", whole)


def _counts(value: object) -> bool:
    """Whether a value can be a limit: 1e9 operations are as good as an int."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and float(value) >= 1  # type: ignore[arg-type]
