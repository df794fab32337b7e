"""Effects with 95 % intervals: differences between arms seed by seed, Student's t over the seeds.

Seeds are independent, and both arms of a comparison start from the same seed, so the differences are independent
draws. An interval says how well the mean difference is known for this world; it says nothing of other worlds.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.01  # of the optimum, or of all: less than that is called equal

SUPPORTED, OPPOSITE, EQUAL, OPEN = "supported", "not supported: opposite", "not supported: equal", "not separable"


def t_within(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t, in closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3-4).

    >>> round(t_within(2.093, 19), 4), round(t_within(1.0, 1), 4)
    (0.95, 0.5)
    """
    angle = math.atan(t / math.sqrt(df))
    term = total = 1.0 if df % 2 == 0 else math.cos(angle)
    for k in range(2 if df % 2 == 0 else 3, df - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if df % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))


def t_quantile(df: int, within: float = 0.95) -> float:
    """The t with P(|T| <= t) = ``within``.

    >>> round(t_quantile(19), 3), round(t_quantile(9), 3), round(t_quantile(2), 3)
    (2.093, 2.262, 4.303)
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < within else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Effect:
    """A mean over seeds, its interval, and the two-sided p-value against 0."""

    mean: float
    low: float
    high: float
    p: float


def effect(values: Sequence[float]) -> Effect:
    """Mean of at least two values with its 95 % t interval.

    >>> effect([1.0, 2.0, 3.0])  # 2 +- 4.303 / sqrt(3)
    Effect(mean=2.0, low=-0.484..., high=4.484..., p=0.074...)
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two seeds, got {len(values)}")
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile(len(values) - 1) * error
    if error == 0:
        return Effect(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Effect(mean, mean - half, mean + half, max(0.0, 1 - t_within(abs(mean) / error, len(values) - 1)))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Effect:
    """``ours`` less ``theirs``, paired by seed.

    >>> difference([3.0, 5.0], [2.0, 4.0])
    Effect(mean=1.0, low=1.0, high=1.0, p=0.0)
    """
    return effect([a - b for a, b in zip(ours, theirs, strict=True)])


def verdict(found: Effect, margin: float = MARGIN) -> str:
    """What an effect says of the claim that it is positive.

    >>> [verdict(Effect(0.1, low, high, 0.5)) for low, high in ((0.05, 0.15), (-0.1, 0.3), (-0.005, 0.004))]
    ['supported', 'not separable', 'not supported: equal']
    >>> verdict(Effect(-0.2, -0.3, -0.1, 0.0))
    'not supported: opposite'
    """
    if -margin < found.low and found.high < margin:
        return EQUAL
    if found.low > 0:
        return SUPPORTED
    return OPPOSITE if found.high < 0 else OPEN


def survives_holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of many comparisons are still different from 0 when all are asked at once (Holm).

    >>> survives_holm([0.001, 0.04, 0.02])
    [True, True, True]
    >>> survives_holm([0.001, 0.04, 0.03])
    [True, False, False]
    """
    keeps, found = True, [False] * len(p_values)
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        keeps = keeps and p_values[i] <= level / (len(p_values) - rank)
        found[i] = keeps
    return found
