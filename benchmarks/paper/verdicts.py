"""From paired differences to a verdict. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
REPRODUCED, UNRESOLVED, CONTRADICTED = "reproduced", "not resolved", "contradicted"


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of paired differences, and the two ends of its interval by Student's t at CONFIDENCE; one difference alone has no bounded one."""

    mean: float
    low: float
    high: float


def interval(differences: Sequence[float]) -> Interval:
    """Raises ValueError where there are none."""
    from scipy.stats import t

    count, mean = len(differences), statistics.fmean(differences)
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def verdict(found: Interval, margin: float | None = None) -> str:
    """What an interval says of a claim.

    Without a margin the claim is that the differences are above 0: reproduced or contradicted where the interval excludes 0, above it or below.
    With one, that they are 0 but for `margin`: reproduced where the interval lies within it, contradicted where it lies outside altogether.
    """
    if margin is None:
        return REPRODUCED if found.low > 0 else CONTRADICTED if found.high < 0 else UNRESOLVED
    if -margin < found.low and found.high < margin:
        return REPRODUCED
    return CONTRADICTED if found.low > margin or found.high < -margin else UNRESOLVED


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that is several comparisons: as much as the worst of them says."""
    return next((worst for worst in (CONTRADICTED, UNRESOLVED) if worst in verdicts), REPRODUCED)
