"""How well a fit speaks of what it has not seen: other sequences, other layers, other tasks.

Every answer is two shares of (layer, statistic) pairs within 20 %, `statistics.equal` and ``_plain`` without its gaps near
0, beside the same shares between two halves of the trace itself: no model of one half can be expected to do better on the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from sim.fitting import statistics as stat
from sim.fitting.fit import Fitted, FittedLayer, Memory, fit, probits_of, statistics_of, synthetic_statistics, values_of
from sim.traces import RecordedTrace

SEEDS = (1, 2, 3, 4)
"""Seeds of reported synthetic traces; fitting uses others."""

_Progress = Callable[[int, int], None]


def measured(trace: RecordedTrace) -> list[dict[str, float]]:
    """Return the statistics of every layer of ``trace``."""
    where = stat.layout(trace.seqlens, trace.domain_of_sequence)
    return [statistics_of(trace, row, where) for row in range(len(trace.layers))]


def check(trace: RecordedTrace) -> None:
    """Raise ValueError if ``trace`` is too small for `halves` and `depth`."""
    for what, found, least in (
        ("sequences", len(trace.seqlens), 2),
        ("layers", len(trace.layers), 3),
    ):
        if found < least:
            raise ValueError(f"trace: expected at least {least} {what} to hold some out, found {found}")


def halves(trace: RecordedTrace, seed: int, jobs: int | None, progress: _Progress) -> dict[str, float]:
    """Fit on every other sequence, compare with the statistics of the rest; ``noise`` compares the halves themselves.

    The trace is one that `check` accepts. Raises ValueError if a half is too short to fit.
    """
    n = len(trace.seqlens)
    one, other = (trace.part(sequences=range(first, n, 2)) for first in (0, 1))
    fitted = fit(one, seed=seed, jobs=jobs, progress=progress)
    real = measured(other)
    return _shares("halves", real, synthetic_statistics(fitted, SEEDS, other)) | _shares("noise", real, measured(one))


def _shares(name: str, real: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        name: stat.share_within(real, other),
        f"{name}_plain": stat.share_within(real, other, plain=True),
    }


def depth(fitted: Fitted) -> dict[str, float]:
    """Predict every second layer's parameters from its neighbours; of its own, only the popularity is known.

    The trace is one that `check` accepts.
    """
    rows = range(1, len(fitted.layers) - 1, 2)
    guessed = list(fitted.layers)
    for row in rows:
        guessed[row] = _guess(fitted, row, [fitted.layers[row - 1].theta, fitted.layers[row + 1].theta], fitted.memory)
    synthetic = synthetic_statistics(replace(fitted, layers=tuple(guessed)), SEEDS)
    real = fitted.real
    return _shares("depth", [real[row] for row in rows], [synthetic[row] for row in rows])


def transfer(fitted: Fitted, others: Sequence[Fitted]) -> dict[str, float]:
    """Predict a trace's parameters from fits of ``others`` (the mean of each layer); known are popularity and prefix.

    Raises ValueError if the others lack its layers.
    """
    if not others or any(len(other.layers) != len(fitted.layers) for other in others):
        raise ValueError(
            f"others: expected traces of {len(fitted.layers)} layers, found {[len(o.layers) for o in others]}"
        )
    memory = Memory(
        slow_correlation=float(np.mean([other.memory.slow_correlation for other in others])),
        fast_correlation=float(np.mean([other.memory.fast_correlation for other in others])),
        prefix_length=fitted.memory.prefix_length,
        correlation_spread=float(np.mean([other.memory.correlation_spread for other in others])),
    )
    guessed = tuple(
        _guess(fitted, row, [other.layers[row].theta for other in others], memory) for row in range(len(fitted.layers))
    )
    synthetic = synthetic_statistics(replace(fitted, layers=guessed, memory=memory), SEEDS)
    return _shares("transfer", fitted.real, synthetic)


def _guess(fitted: Fitted, row: int, thetas: Sequence[dict[str, float]], memory: Memory) -> FittedLayer:
    own = fitted.layers[row]
    theta = {name: float(np.mean([found.get(name, value) for found in thetas])) for name, value in own.theta.items()}
    return own._replace(theta=theta, values=values_of(theta, probits_of(fitted.trace, row, memory.prefix_length)))
