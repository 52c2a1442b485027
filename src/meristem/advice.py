"""Advice before a run; what it needs is imported when somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meristem.experiments.advise import Advice
    from meristem.experiments.config import Experiment


def advise(
    experiment: Experiment | str | Path,
    out: str | Path | None = None,
    share: float | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Whether a planned growth pays, and when, or which size to train instead.

    Of texts. The law

        L = E + A / N^a + B / D^b        N: size, D: data

    (Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, arXiv
    2203.15556), with exponents and best targets per parameter as measured in
    `benchmarks/best`, says what size is best at the cost of the run, and what the grown
    net ends at if it goes on along the curve of one that was large all along. Two probes,
    much shorter than the run and at a constant learning rate, check the latter: the small
    net that grows half-way, and the grown net from the start. The law is one of new data.

    Args:
        experiment: A planned run with [grow], or its TOML file.
        out: Folder of the probes' results, which are not run again; `results/advise`
            beside the file, or in the current folder, by default.
        share: What the probes cost, as a share of the planned run, about; .05 by default, and
            up to .3 where the run is so short that probes would be too short.
        report: `report(probe, step, steps)`, called meanwhile.

    Returns:
        `grow`, the moment `at` which, the expected compute `multiplier` (the cost of the
        best fixed size for the same loss, over that of the run), `best_size`, and what it
        rests on; as text a few sentences.

    Raises:
        ConfigError: The experiment does not grow or learns no text, or its probes would be
            too short.
        DataError: The loss of a probe does not fall.

    Examples:
        >>> advice = advise("experiment.toml")  # doctest: +SKIP
        >>> advice.grow, advice.at, advice.multiplier.value  # doctest: +SKIP
        (True, 0.55, 1.12)
    """
    try:
        from meristem.experiments.advise import advised
    except ModuleNotFoundError as error:
        raise ImportError(
            f"meristem.advise needs the extra [cli] ({error.name} is missing). hint: pip "
            "install 'meristem-torch[cli]'"
        ) from error
    return advised(experiment, out, share, report)
