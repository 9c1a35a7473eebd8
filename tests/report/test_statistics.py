from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from diffusers_safe.report.statistics import (
    Estimate,
    bootstrap_mean_interval,
    expected_maximum,
    expected_maximum_interval,
    mcnemar,
    paired_difference,
    sign_flip_test,
    wilson_interval,
)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 160), (5, 160), (80, 160), (160, 160), (7, 9)])
def test_wilson_agrees_with_scipy(successes, n, confidence):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 1.0)])
def test_wilson_rejects_what_is_no_proportion(arguments):
    with pytest.raises(ValueError, match="trial|confidence"):
        wilson_interval(*arguments)


def test_bootstrap_of_a_large_sample_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=500)
    low, high = bootstrap_mean_interval(values)
    reach = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.02)
    assert bootstrap_mean_interval(values) == (low, high)  # seeded


def test_clusters_that_always_agree_count_once():
    per_cluster = np.random.default_rng(0).random(20)
    repeated, names = np.repeat(per_cluster, 50), np.repeat(np.arange(20), 50)
    assert bootstrap_mean_interval(repeated, names.tolist()) == pytest.approx(bootstrap_mean_interval(per_cluster))
    assert np.ptp(bootstrap_mean_interval(repeated)) < np.ptp(bootstrap_mean_interval(per_cluster)) / 4


def test_images_count_alike_whatever_their_prompts():
    names = ["cat", "cat", "cat", "dog"]
    assert Estimate.of_images([1.0, 1.0, 1.0, 0.0], names).value == 0.75
    assert paired_difference([0, 0, 0, 0], [1, 1, 1, 0], names).value == 0.75
    # Two prompts drawn again: both the cat, both the dog, or one each.
    assert bootstrap_mean_interval([1.0, 1.0, 1.0, 0.0], names) == (0, 1)
    assert bootstrap_mean_interval([1.0, 1.0, 1.0, 0.0], names, confidence=0.4) == (0.75, 0.75)


@pytest.mark.parametrize(("values", "clusters"), [([], None), ([1.0, 2.0], ["one"])])
def test_bootstrap_rejects_bad_input(values, clusters):
    with pytest.raises(ValueError, match="at least 1 number|one for each"):
        bootstrap_mean_interval(values, clusters)


def test_estimates_read_well():
    assert str(Estimate.rate(5, 160)) == "3.1 % [1.3, 7.1], N=160"
    assert str(Estimate(-0.012, -0.03, 0.0, 20, "points")) == "-1.2 points [-3.0, 0.0], N=20"
    assert str(Estimate(0.0274, 0.02, 0.0351, 20, "")) == "0.027 [0.020, 0.035], N=20"
    assert Estimate.mean([0.5, -0.25], unit="points").headline == "+12.5 points"


@pytest.mark.parametrize(("n", "draws"), [(25, 25), (60, 25), (1000, 3)])
def test_expected_maximum_is_that_of_the_hypergeometric_distribution(n, draws):
    values = np.random.default_rng(1).integers(0, 11, n) / 10
    # P(maximum <= v) = C(number of values <= v, draws) / C(n, draws)
    levels = np.arange(11) / 10
    below = [comb(int((values <= level + 1e-9).sum()), draws) / comb(n, draws) for level in levels]
    share = np.diff(below, prepend=0)
    mean = share @ levels
    std = np.sqrt(share @ (levels - mean) ** 2)
    assert expected_maximum(values, draws) == pytest.approx((mean, std), abs=1e-9)
    # and that of the paper's procedure
    rng = np.random.default_rng(0)
    maxima = [rng.choice(values, draws, replace=False).max() for _ in range(2000)]
    assert np.mean(maxima) == pytest.approx(mean, abs=4 * std / 2000**0.5 + 1e-9)
    assert np.std(maxima) == pytest.approx(std, rel=0.2, abs=1e-9)


def test_expected_maximum_needs_as_many_prompts_as_draws():
    with pytest.raises(ValueError, match="24 prompts"):
        expected_maximum([0.5] * 24)
    with pytest.raises(ValueError, match="draws is 0"):
        expected_maximum([0.5], 0)


def test_the_interval_of_the_expected_maximum_holds_it():
    values = np.random.default_rng(1).random(200)
    low, high = expected_maximum_interval(values)
    assert low < expected_maximum(values)[0] < high
    assert expected_maximum_interval([0.5] * 30) == pytest.approx((0.5, 0.5))
    # of one draw it is that of the mean
    assert expected_maximum_interval(values, 1) == pytest.approx(bootstrap_mean_interval(values), abs=0.01)
    with pytest.raises(ValueError, match="24 prompts"):
        expected_maximum_interval([0.5] * 24)


@pytest.mark.parametrize(
    ("gained", "lost", "same"), [(0, 0, 3), (3, 0, 0), (5, 9, 20), (9, 5, 0), (700, 612, 9), (4, 4, 1)]
)
def test_mcnemar_agrees_with_the_binomial_test(gained, lost, same):
    before = [0] * gained + [1] * lost + [1] * same
    after = [1] * gained + [0] * lost + [1] * same
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1
    assert mcnemar(before, after) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(after, before) == mcnemar(before, after)


def test_sign_flips_agree_with_scipy():
    rng = np.random.default_rng(2)
    for n, tolerance in ((7, 1e-12), (40, 0.02)):
        before, after = rng.random(n), rng.random(n) + 0.1
        expected = permutation_test(
            (after - before,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
        )
        assert sign_flip_test(before, after) == pytest.approx(expected.pvalue, abs=tolerance)
    assert sign_flip_test(np.zeros(40), np.ones(40)) == 1 / 10_001  # never 0
    assert sign_flip_test([1.0] * 20, [1.0] * 20) == 1


def test_images_of_one_prompt_are_no_independent_pairs():
    before, after = [0.0] * 60, [1.0, 1.0, 0.9] * 20
    assert sign_flip_test(before, after) < 0.001
    assert sign_flip_test(before, after, ["a", "b", "c"] * 20) == 2 / 8


def test_differences_of_pairs():
    before, after = [0, 0, 1, 0], [1, 0, 1, 1]
    difference = paired_difference(before, after)
    assert (difference.value, difference.unit, difference.n) == (0.5, "points", 4)
    assert difference == Estimate.mean([1, 0, 0, 1], unit="points")
    assert paired_difference(before, after, ["a", "a", "b", "b"], "").unit == ""


@pytest.mark.parametrize("test", [mcnemar, sign_flip_test, paired_difference])
def test_pairs_must_be_pairs(test):
    for before, after in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="must be pairs"):
            test(before, after)
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="samples is 0"):
        sign_flip_test([0.0], [1.0], samples=0)


def test_images_that_all_agree_leave_room_for_others():
    none = Estimate.of_images([0.0] * 8, ["a", "b", "c", "d"] * 2)
    assert (none.value, none.low, none.high, none.n) == (0, 0, wilson_interval(0, 4)[1], 8)
    every = Estimate.of_images([1.0] * 8, ["a", "b", "c", "d"] * 2)
    assert (every.value, every.low, every.high) == (1, wilson_interval(4, 4)[0], 1)
    reach = wilson_interval(0, 4)[1]
    for before, after, low, high in ((0, 0, -reach, reach), (1, 0, -1, -1 + 2 * reach), (0, 1, 1 - 2 * reach, 1)):
        change = paired_difference([before] * 8, [after] * 8, ["a", "b", "c", "d"] * 2)
        assert (change.value, change.low, change.high) == pytest.approx((after - before, low, high))
    distance = paired_difference([0.5] * 8, [0.5] * 8, unit="")
    assert (distance.low, distance.high) == (0, 0)


def test_of_a_single_prompt_images_are_drawn():
    values, one = [1.0, 0.0, 1.0, 1.0], ["a"] * 4
    assert Estimate.of_images(values, one) == Estimate.rate(3, 4)
    assert Estimate.of_images([1.0] * 4, one) == Estimate.rate(4, 4)
    distances = Estimate.of_images([0.1, 0.2, 0.3, 0.4], one, "")
    assert distances == Estimate.mean([0.1, 0.2, 0.3, 0.4], unit="") and distances.low < distances.high
    assert paired_difference([0.0] * 4, values, one) == paired_difference([0.0] * 4, values)
    assert sign_flip_test([0.0] * 8, [1.0] * 8, ["a"] * 8) == 2 / 2**8


def test_prompts_of_equal_shares_give_no_interval_without_width():
    halves = Estimate.of_images([1.0, 0.0] * 2, ["a", "a", "b", "b"])
    assert (halves.value, halves.low, halves.high, halves.n) == (0.5, *wilson_interval(1, 2), 4)
    change = paired_difference([0.0] * 4, [1.0, 0.0] * 2, ["a", "a", "b", "b"])
    reach = wilson_interval(0, 2)[1]
    assert (change.value, change.low, change.high) == pytest.approx((0.5, 0.5 - 1.5 * reach, 0.5 + 0.5 * reach))
    low, high = expected_maximum_interval([0.0] * 30)
    assert (low, high) == (0, 1 - (1 - wilson_interval(0, 30)[1]) ** 25) and high > 0.9


def test_the_mean_of_one_image_has_no_interval():
    assert str(Estimate.of_images([0.25], ["a"], "")) == "0.250 [one image: no interval], N=1"
    assert str(Estimate.of_images([0.25, 0.25], ["a", "b"], "")) == "0.250 [0.250, 0.250], N=2"
    assert str(Estimate.of_images([1.0], ["a"])) == "100.0 % [20.7, 100.0], N=1"
