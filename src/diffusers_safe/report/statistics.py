"""Estimates with uncertainty: every rate and mean of an evaluation has an interval and its N."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from math import comb
from statistics import NormalDist

import numpy as np


CONFIDENCE = 0.95
DRAWS = 25  # prompts in a sample of SLD's expected maximum


def wilson_interval(successes: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The Wilson score interval of a proportion. Unlike the normal interval it holds at 0 and N successes.

    Args:
        successes (`float`): 0 to `n`. It need not be a whole number (which SciPy's interval requires): an average over
            prompts has `n` prompts as trials, and a rate that is no multiple of `1 / n`.
        n (`int`): Number of independent trials, at least 1.
        confidence (`float`, defaults to 0.95): Between 0 and 1, both excluded.

    Returns:
        `tuple[float, float]`: Lower and upper end, in [0, 1].

    Raises:
        `ValueError`: If an argument is out of range.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: there must be at least 1 trial and 0 to n successes")
    z = normal_reach(confidence)
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else float(middle - reach)
    high = 1.0 if successes == n else float(middle + reach)
    return low, high


def normal_reach(confidence: float = CONFIDENCE) -> float:
    """The half-width of a normal interval in standard deviations: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + _checked(confidence)) / 2)


def independent_units(clusters: Sequence[Hashable]) -> int:
    """The number of resampled units: clusters, or the members of a single cluster."""
    count = len(set(clusters))
    return count if count > 1 else len(clusters)


def bootstrap_mean_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    samples: int = 10_000,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean.

    Images of one prompt are more similar than images of different prompts. With the prompts as `clusters`, whole
    prompts are resampled instead of single images. For differences between two models, give the differences of image
    pairs. With a single cluster, the values are resampled.

    Args:
        values (`Sequence[float]`): N numbers, one for each image or image pair.
        clusters (`Sequence`, *optional*): N names of clusters, such as prompts.
        seed (`int`, defaults to 0): Seed of the resampling.
        samples (`int`, defaults to 10,000): Number of bootstrap samples.
        confidence (`float`, defaults to 0.95): Between 0 and 1, both excluded.

    Returns:
        `tuple[float, float]`: Lower and upper end. If all values are equal, the interval has no width.

    Raises:
        `ValueError`: If there are no values, not one cluster name for each, or `samples` or `confidence` is out of
            range.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    tail = (1 - _checked(confidence)) / 2
    sums, sizes = _cluster_sums(values, clusters)
    n = len(sums)
    rng = np.random.default_rng(seed)
    # In slices, so that thousands of images do not need gigabytes.
    step = max(1, 10_000_000 // n)
    counts = [min(step, samples - start) for start in range(0, samples, step)]
    resampled = (rng.integers(n, size=(count, n)) for count in counts)
    means = np.concatenate([sums[indices].sum(axis=1) / sizes[indices].sum(axis=1) for indices in resampled])
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def expected_maximum(values_by_prompt: Sequence[float], draws: int = DRAWS) -> tuple[float, float]:
    """The expected maximum of SLD: the largest value among `draws` prompts, on average.

    `draws` prompts are sampled without replacement, and the largest of their values is taken. Mean and standard
    deviation are exact, from the order statistics. (The paper samples 10,000 times, which varies by about 0.06.)

    Args:
        values_by_prompt (`Sequence[float]`): One number for each prompt, such as the share of its images that are
            inappropriate; at least `draws` of them.
        draws (`int`, defaults to 25): Number of prompts in a sample.

    Returns:
        `tuple[float, float]`: Mean and standard deviation of the maximum. The paper reports the latter after `+-`: it
        is the spread of the maxima, not an error of the mean.

    Raises:
        `ValueError`: If there are fewer prompts than `draws`, or `draws` is below 1.

    Source: P. Schramowski et al., Safe Latent Diffusion, CVPR 2023 (arXiv 2211.05105), table 1: "at least once for 25
    prompts"; after S. Gehman et al., RealToxicityPrompts, Findings of EMNLP 2020.
    """
    values, weights = _order_statistics(values_by_prompt, draws)
    mean = float(values @ weights)
    return mean, float(np.sqrt((values - mean) ** 2 @ weights))


def expected_maximum_interval(
    values_by_prompt: Sequence[float],
    draws: int = DRAWS,
    seed: int = 0,
    samples: int = 1_000,
    confidence: float = CONFIDENCE,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of [`expected_maximum`], over prompts. If all values are 0, the
    interval would have no width; its upper end then follows from Wilson's interval of no success.

    Arguments and errors are those of [`expected_maximum`] and [`bootstrap_mean_interval`].
    """
    values, weights = _order_statistics(values_by_prompt, draws)
    n = len(values)
    tail = (1 - _checked(confidence)) / 2
    rng = np.random.default_rng(seed)
    maxima = [np.sort(values[rng.integers(n, size=n)]) @ weights for _ in range(samples)]
    low, high = np.quantile(maxima, [tail, 1 - tail])
    if not values.any():
        high = 1 - (1 - wilson_interval(0, n, confidence)[1]) ** draws
    return float(low), float(high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """The exact McNemar test of two shares on the same prompts and seeds.

    It depends only on the pairs that changed: if both models were equal, each would have changed in either direction
    with probability 1/2. Pairs must be independent, so each prompt may occur only once; for several images of a prompt
    see [`sign_flip_test`].

    Args:
        before (`Sequence[bool]`): N answers of one model, 0 or 1.
        after (`Sequence[bool]`): N answers of the other model, in the same order.

    Returns:
        `float`: The two-sided p-value; 1 if no pair changed.

    Raises:
        `ValueError`: If lengths differ, there are no pairs, or an answer is neither 0 nor 1.

    Source: Q. McNemar, Psychometrika 12 (1947); the exact form is the binomial test of the discordant pairs.
    """
    first, second = _paired(before, after)
    if not np.isin([first, second], (0, 1)).all():
        raise ValueError("McNemar's test compares shares: every value must be 0 or 1")
    gained, lost = int(((first == 0) & (second == 1)).sum()), int(((first == 1) & (second == 0)).sum())
    changed = gained + lost
    tail = sum(comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def sign_flip_test(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    samples: int = 10_000,
) -> float:
    """A permutation test of two means on the same prompts and seeds.

    If both models were equal, each difference could have the opposite sign as well. With clusters, the sign of whole
    prompts is flipped. All combinations of signs are tested if there are at most 2^13, else `samples` random ones.

    Args:
        before (`Sequence[float]`): N values of one model.
        after (`Sequence[float]`): N values of the other model, in the same order.
        clusters (`Sequence`, *optional*): N names of clusters, such as prompts.
        seed (`int`, defaults to 0): Seed of the sampling.
        samples (`int`, defaults to 10,000): Number of random combinations.

    Returns:
        `float`: The two-sided p-value, above 0: random combinations include the observed one.

    Raises:
        `ValueError`: If lengths differ, there are no pairs, or `samples` is below 1.

    Source: R. A. Fisher, The design of experiments (1935), section 21; B. Phipson and G. K. Smyth, Permutation
    p-values should never be zero, SAGMB 9 (2010).
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    first, second = _paired(before, after)
    units, _ = _cluster_sums(second - first, clusters)
    n = len(units)
    observed = abs(units.sum())
    edge = observed - 1e-12 * max(1.0, np.abs(units).sum())  # equal up to rounding is as extreme
    if n <= 13:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ units) >= edge).mean())
    rng = np.random.default_rng(seed)
    step = max(1, 10_000_000 // n)
    counts = [min(step, samples - start) for start in range(0, samples, step)]
    extreme = sum(
        int((np.abs((1 - 2 * rng.integers(2, size=(count, n), dtype=np.int8)) @ units) >= edge).sum())
        for count in counts
    )
    return (1 + extreme) / (1 + samples)


def paired_difference(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Hashable] | None = None, unit: str = "%"
) -> "Estimate":
    """The mean of `after - before` with its bootstrap interval; shares (`"%"`) differ by `"points"`.

    If all clusters of shares changed equally, or none did, the bootstrap interval has no width. The interval then
    includes an opposite change in as large a share of pairs as Wilson's interval of 0 in this number of clusters.

    Arguments and errors are those of [`sign_flip_test`].
    """
    first, second = _paired(before, after)
    difference, n = second - first, len(first)
    estimate = Estimate.mean(difference, clusters, "points" if unit == "%" else unit)
    if unit == "%" and estimate.low == estimate.high:
        change, reach = estimate.value, wilson_interval(0, n if clusters is None else independent_units(clusters))[1]
        return replace(estimate, low=change - reach * (1 + change), high=change + reach * (1 - change))
    return estimate


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval. `str()` gives `"3.1 % [1.2, 7.9], N=160"`.

    Attributes:
        value (`float`): The number; a fraction for the units `"%"` and `"points"`, which are shown times 100.
        low (`float`): Lower end of the interval.
        high (`float`): Upper end of the interval.
        n (`int`): Number of images or image pairs.
        unit (`str`, defaults to `"%"`): `"%"` for rates, `"points"` for differences of rates (shown with a sign),
            `""` for anything else.

    Raises:
        `ValueError`: If the unit is unknown.
    """

    value: float
    low: float
    high: float
    n: int
    unit: str = "%"

    def __post_init__(self):
        if self.unit not in ("%", "points", ""):
            raise ValueError(f'unit is "{self.unit}"; it must be "%", "points" or ""')

    @classmethod
    def rate(cls, successes: int, n: int) -> "Estimate":
        """A proportion with its Wilson interval."""
        return cls(successes / n if n else 0.0, *wilson_interval(successes, n), n)

    @classmethod
    def mean(
        cls, values: Sequence[float], clusters: Sequence[Hashable] | None = None, unit: str = "%", seed: int = 0
    ) -> "Estimate":
        """A mean with its bootstrap interval."""
        low, high = bootstrap_mean_interval(values, clusters, seed)
        return cls(float(np.mean(values)), low, high, len(values), unit)

    @classmethod
    def of_images(cls, values: Sequence[float], prompts: Sequence[Hashable], unit: str = "%") -> "Estimate":
        """The average over images. A share of prompts with one image each has its Wilson interval. If prompts have
        several images, the interval is a bootstrap over prompts; if all prompts have the same share, that would have
        no width, and the interval is Wilson's with one image for each prompt."""
        units = independent_units(prompts)
        if unit == "%" and units == len(prompts):
            return cls.rate(int(sum(values)), len(values))
        estimate = cls.mean(values, prompts, unit)
        if unit == "%" and estimate.low == estimate.high:
            low, high = wilson_interval(estimate.value * units, units)
            return replace(estimate, low=low, high=high)
        return estimate

    @property
    def headline(self) -> str:
        """The number: `"3.1 %"`, `"-0.4 points"` or `"0.027"`."""
        return f"{self._show(self.value)} {self.unit}".strip()

    @property
    def interval(self) -> str:
        """The interval: `"[1.2, 7.9]"`. The mean of one image has none."""
        if self.n == 1 and self.unit == "":
            return "[one image: no interval]"
        return f"[{self._show(self.low)}, {self._show(self.high)}]"

    def __str__(self) -> str:
        return f"{self.headline} {self.interval}, N={self.n}"

    def _show(self, number: float) -> str:
        if self.unit == "":
            return f"{number:.3f}"
        number = round(100 * number, 1) + 0.0  # + 0.0 avoids "-0.0"
        return f"{number:+.1f}" if self.unit == "points" and number else f"{number:.1f}"


def _order_statistics(values_by_prompt: Sequence[float], draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The values in ascending order, and for each the probability that it is the largest of a sample."""
    values = np.asarray(values_by_prompt, dtype=np.float64)
    n = len(values)
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    if values.ndim != 1 or n < draws:
        raise ValueError(f"{n} prompts; an expected maximum of {draws} prompts needs at least as many")
    # The i-th smallest of n, counted from 0, with probability C(i, draws - 1) / C(n, draws).
    return np.sort(values), np.array([comb(rank, draws - 1) / comb(n, draws) for rank in range(n)])


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """The sum and the size of each cluster; each value is a cluster if there are none."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}; there must be one row of at least 1 number")
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} cluster names for {len(values)} values; there must be one for each")
    if clusters is None or independent_units(clusters) == len(clusters):
        return values, np.ones(len(values))
    position = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    member = np.array([position[name] for name in clusters])
    return np.bincount(member, weights=values), np.bincount(member)


def _paired(before: Sequence[float], after: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(f"values before and after have shapes {first.shape} and {second.shape}; there must be pairs")
    return first, second


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1")
    return confidence
