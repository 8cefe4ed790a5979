"""bara.calibrate_conformal against its own definition, and its coverage by simulation."""

import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import betabinom

import bara
from bara import BaraError, ClassificationPredictive, RegressionPredictive
from bara.evaluation.conformal import FILE, Conformal, load_conformal, save_conformal


def classified(n, seed=0, classes=4):
    """A model that is too sure of itself: its logits are twice those that the labels follow."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
    return ClassificationPredictive((2 * logits).log_softmax(-1).unsqueeze(0), labels)


def regressed(n, seed=0):
    """Two draws whose variances are a fifth of the noise's, which grows with the mean."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise, jitter = torch.randn(3, n, generator=generator)
    std = 0.5 + mean.abs()
    draws = torch.stack([mean, mean + 0.1 * jitter])
    return RegressionPredictive(draws, (0.2 * std**2).expand(2, -1), mean + std * noise)


def quantile(scores, coverage):
    """The ceil((n + 1) coverage)-th smallest, in exact arithmetic."""
    rank = math.ceil((len(scores) + 1) * Fraction(str(coverage)))
    return sorted(scores.tolist())[rank - 1]


@pytest.mark.parametrize(("n", "coverage"), [(10, 0.9), (57, 0.8), (200, 0.95), (99, 0.9)])
def test_sets_and_intervals_are_those_of_the_exact_quantile(n, coverage):
    calibration, new = classified(n), classified(30, seed=1)
    scores = 1 - calibration.probs.double()[torch.arange(n), calibration.labels]
    expected = 1 - new.probs.double() <= quantile(scores, coverage) + 1e-7
    found = bara.calibrate_conformal(calibration).sets(new, coverage)
    assert found.dtype == torch.bool
    assert torch.equal(found, expected)

    calibration, new = regressed(n), regressed(30, seed=1)
    std = calibration.variance.double().sqrt()
    width = quantile((calibration.labels - calibration.mean).abs() / std, coverage)
    lower, upper = bara.calibrate_conformal(calibration).intervals(new, coverage)
    torch.testing.assert_close(lower, new.mean - width * new.variance.double().sqrt())
    torch.testing.assert_close(upper, new.mean + width * new.variance.double().sqrt())


@pytest.mark.parametrize("kind", ["sets", "intervals"])
def test_the_truth_is_inside_as_often_as_promised(kind):
    """Over calibration sets, the count inside is beta-binomial for scores without ties."""
    n, new, coverage, repeats = 39, 500, 0.8, 60
    make = classified if kind == "sets" else regressed
    inside = 0
    for seed in range(repeats):
        conformal = bara.calibrate_conformal(make(n, seed=2 * seed))
        fresh = make(new, seed=2 * seed + 1)
        if kind == "sets":
            inside += int(conformal.sets(fresh, coverage)[torch.arange(new), fresh.labels].sum())
        else:
            lower, upper = conformal.intervals(fresh, coverage)
            inside += int(((lower <= fresh.labels) & (fresh.labels <= upper)).sum())
    rank = math.ceil((n + 1) * coverage)  # (n + 1) coverage = 32 exactly: no more than promised
    law = betabinom(new, rank, n + 1 - rank)
    error = 4 * law.std() / math.sqrt(repeats)
    assert law.mean() == pytest.approx(coverage * new)
    assert abs(inside / repeats - law.mean()) < error
    # the model's own interval or set would not do
    own = regressed(4000)
    lower, upper = own.interval(coverage)
    assert ((lower <= own.labels) & (own.labels <= upper)).double().mean() < coverage - 0.2


def test_a_class_without_calibration_rows_can_be_in_a_set():
    calibration = classified(50)
    kept = calibration.select(calibration.labels != 3)
    sets = bara.calibrate_conformal(kept).sets(classified(200, seed=1), 0.9)
    assert sets[:, 3].any()


def test_questions_may_have_other_numbers_of_choices():
    conformal = bara.calibrate_conformal(classified(50))
    fewer, more = classified(20, seed=1, classes=3), classified(20, seed=1, classes=5)
    missing = torch.cat([fewer.log_probs_draws, torch.full((1, 20, 2), -torch.inf)], dim=-1)
    sets = conformal.sets(ClassificationPredictive(missing), 0.98)
    assert torch.equal(sets[:, :3], conformal.sets(fewer, 0.98))
    assert sets[:, :3].any()
    assert not sets[:, 3:].any()
    assert conformal.sets(more, 0.98)[:, 4].any()


def test_records_have_names_and_plain_numbers():
    conformal, new = bara.calibrate_conformal(classified(50)), classified(5, seed=1)
    named = ClassificationPredictive(new.log_probs_draws, None, ("a", "b", "c", "d"))
    for record, inside in zip(conformal.to_records(named), conformal.sets(new), strict=True):
        assert record == {"prediction_set": [n for n, x in zip("abcd", inside, strict=True) if x]}
    conformal, new = bara.calibrate_conformal(regressed(50)), regressed(5, seed=1)
    ends = torch.stack(conformal.intervals(new, 0.8), dim=1)
    expected = [{"interval": pair} for pair in ends.tolist()]
    assert conformal.to_records(new, 0.8) == expected


def test_too_few_rows_are_one_clear_line():
    conformal = bara.calibrate_conformal(classified(18))
    assert conformal.sets(classified(5), 0.9).shape == (5, 4)
    with pytest.raises(BaraError, match=r"18 labelled rows cannot .* 0.95: .* at least 20,"):
        conformal.sets(classified(5), 0.95)
    with pytest.raises(BaraError, match=r"9 labelled rows cannot .* 0.9: .* at least 10,"):
        bara.calibrate_conformal(regressed(9)).intervals(regressed(5), 0.9)


def test_what_cannot_be_used_is_one_clear_line():
    sets, intervals = (bara.calibrate_conformal(make(30)) for make in (classified, regressed))
    with pytest.raises(BaraError, match="intervals are for regression"):
        sets.intervals(regressed(5))
    with pytest.raises(BaraError, match="sets are for classification"):
        intervals.sets(classified(5))
    with pytest.raises(BaraError, match=r"between 0 and 1, not 1\.0"):
        sets.sets(classified(5), 1.0)
    with pytest.raises(BaraError, match="need labels"):
        bara.calibrate_conformal(ClassificationPredictive(torch.zeros(1, 3, 2)))
    with pytest.raises(BaraError, match="sets and intervals are for classification"):
        bara.calibrate_conformal(object())
    with pytest.raises(BaraError, match="sets and intervals are for classification"):
        sets.to_records(object())
    silent = RegressionPredictive(torch.zeros(1, 20), torch.zeros(1, 20), torch.zeros(20))
    with pytest.raises(BaraError, match="variance of 0"):
        bara.calibrate_conformal(silent)


@pytest.mark.parametrize("make", [classified, regressed])
def test_saved_beside_the_adapter_and_loaded_under_the_same_conditions(tmp_path, make):
    conformal = bara.calibrate_conformal(make(30))
    save_conformal(tmp_path, conformal, num_draws=10, seed=0)
    loaded = load_conformal(tmp_path, num_draws=10, seed=0)
    for name, part in vars(conformal).items():
        other = getattr(loaded, name)
        assert (part is None and other is None) or torch.equal(part, other)
    with pytest.raises(BaraError, match="made with num_draws = 10, not 3"):
        load_conformal(tmp_path, num_draws=3, seed=0)


def test_a_file_that_is_missing_or_damaged_is_one_clear_line(tmp_path):
    with pytest.raises(BaraError, match="--calibrate-conformal"):
        load_conformal(tmp_path)
    conformal = bara.calibrate_conformal(classified(30))
    damaged = [
        Conformal(probs=conformal.probs),
        Conformal(probs=conformal.probs, labels=conformal.labels + 4),
        Conformal(probs=conformal.probs * 2, labels=conformal.labels),
        Conformal(residuals=conformal.probs),
        Conformal(residuals=torch.full((9,), math.nan, dtype=torch.float64)),
    ]
    for broken in damaged:
        save_conformal(tmp_path, broken)
        with pytest.raises(BaraError, match="is damaged: remove it"):
            load_conformal(tmp_path)
    (tmp_path / FILE).write_bytes(b"{")
    with pytest.raises(BaraError, match="is damaged: remove it"):
        load_conformal(tmp_path)
