"""95 % intervals: Wilson's of a share of rows, the paired bootstrap's of what compares two.

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
"""Bootstrap samples of an interval."""


def share_of(name: str, rows: NDArray[np.float64]) -> dict[str, Any]:
    """The share of rows that are 1, with Wilson's 95 % interval, which is also right where the
    share is 0 or 1, or the rows are few."""
    share, count, z = float(rows.mean()), len(rows), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle, reach = (
        share + z**2 / (2 * count),
        z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2),
    )
    ends = ((middle + sign * reach) / (1 + z**2 / count) for sign in (-1, 1))
    return {name: share, f"{name}_interval": [min(1.0, max(0.0, end)) for end in ends]}


def with_interval(
    name: str, columns: Sequence[NDArray[np.float64]], statistic: Callable[..., Any]
) -> dict[str, Any]:
    """A statistic of column means, and its 95 % percentile interval over rows drawn together from
    all columns."""
    drawn = _resamples(len(columns[0]))
    resampled = statistic(*(drawn @ column for column in columns))
    low, high = np.nanquantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        name: float(statistic(*(column.mean() for column in columns))),
        f"{name}_interval": [float(low), float(high)],
    }


@cache
def _resamples(rows: int) -> NDArray[np.float64]:
    """Shares [RESAMPLES, rows] of the rows in each bootstrap sample."""
    return (
        generator(0, Purpose.BOOTSTRAP).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
        / rows
    )


def ratio(part: Any, whole: Any) -> Any:
    """part / whole, and nan where a resample has no gap."""
    return np.where(
        np.asarray(whole) > 0, part / np.where(np.asarray(whole) > 0, whole, 1.0), np.nan
    )
