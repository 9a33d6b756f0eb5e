"""95 % confidence intervals: Wilson's for a share of rows, the paired bootstrap's for comparisons.

Source: Wilson, Probable inference (1927); Efron and Tibshirani, An introduction to the bootstrap
(1993), percentile intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.randomness import Purpose, generator

CONFIDENCE = 0.95

RESAMPLES = 2000
"""Number of bootstrap samples behind an interval."""


def share_of(name: str, rows: NDArray[np.float64]) -> dict[str, Any]:
    """The share in 0..1 of `rows` [n] that are 1, under `name`, and Wilson's 95 % interval, which
    holds for few rows and for shares of 0 and 1 too."""
    share, count, z = float(rows.mean()), len(rows), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = share + z**2 / (2 * count)
    half_width = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    ends = ((middle + sign * half_width) / (1 + z**2 / count) for sign in (-1, 1))
    return {name: share, f"{name}_interval": [min(1.0, max(0.0, end)) for end in ends]}


def with_interval(
    name: str, columns: Sequence[NDArray[np.float64]], statistic: Callable[..., Any]
) -> dict[str, Any]:
    """`statistic` of the means of `columns`, each [n], under `name`, and the 95 % percentile
    interval over bootstrap samples, which draw the same rows from all columns."""
    drawn = _resamples(len(columns[0]))
    resampled = statistic(*(drawn @ column for column in columns))
    low, high = np.nanquantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        name: float(statistic(*(column.mean() for column in columns))),
        f"{name}_interval": [float(low), float(high)],
    }


@cache
def _resamples(rows: int) -> NDArray[np.float64]:
    """The share of each row in each bootstrap sample, [RESAMPLES, rows]."""
    counts = generator(0, Purpose.BOOTSTRAP).multinomial(
        rows, np.full(rows, 1 / rows), size=RESAMPLES
    )
    return counts / rows


def ratio(part: Any, whole: Any) -> Any:
    """part / whole elementwise; nan for a `whole` that is not above 0."""
    positive = np.asarray(whole) > 0
    return np.where(positive, part / np.where(positive, whole, 1.0), np.nan)
