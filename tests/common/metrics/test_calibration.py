"""Confidence: calibrated on new queries, and the measures that say so."""

import json

import numpy as np
import pytest

from common.metrics.calibration import (
    Confidence,
    auroc,
    confidence_features,
    expected_calibration_error,
)


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    features = rng.normal(size=(n, 3))
    truth = 1 / (1 + np.exp(-(2 * features[:, 0] - features[:, 1])))
    return features, (rng.random(n) < truth).astype(float)


def test_confidence_is_calibrated_on_new_queries() -> None:
    rng = np.random.default_rng(0)
    confidence = Confidence.fit(*draw(rng, 3000), 20)
    features, correct = draw(rng, 3000)
    probability = confidence.predict(features)
    assert expected_calibration_error(probability, correct) < 0.05
    alone = [max(auroc(column, correct), auroc(-column, correct)) for column in features.T]
    assert auroc(probability, correct) > alone[0] > alone[1] > alone[2]


def test_confidence_rises_with_its_evidence_and_survives_json() -> None:
    rng = np.random.default_rng(1)
    confidence = Confidence.fit(*draw(rng, 300), 20)
    line = np.linspace(-9, 9, 50)[:, None] * np.array([[1.0, -0.5, 0.0]])
    p = confidence.predict(line)
    assert np.all(np.diff(p) >= 0) and p.min() >= 0 and p.max() <= 1 and p[-1] > p[0]
    again = Confidence.from_json(json.loads(json.dumps(confidence.to_json())))
    np.testing.assert_array_equal(again.predict(line), p)


def test_events_of_one_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="whose is not"):
        Confidence.fit(np.zeros((4, 3)), np.ones(4), 20)


def test_features_of_sure_unsure_and_single_lists() -> None:
    entropy, margin, r = confidence_features([0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4])
    assert (entropy, margin, r) == pytest.approx((1.0, 0.0, 0.1))
    entropy, margin, r = confidence_features([0.0, 1000.0], [0.1, 0.9])
    assert (entropy, margin, r) == pytest.approx((0.0, 1.0, 0.9))
    assert tuple(confidence_features([3.0], [0.5])) == (0.0, 1.0, 0.5)


def test_ece_over_equal_mass_bins() -> None:
    assert expected_calibration_error(np.full(20, 0.5), [0, 1] * 10, bins=1) == pytest.approx(0.0)
    assert expected_calibration_error(np.full(20, 0.9), [0, 1] * 10, bins=1) == pytest.approx(0.4)
    # half sure and right, half unsure and wrong: two bins see no error
    p, y = np.array([0.0] * 10 + [1.0] * 10), np.array([0] * 10 + [1] * 10)
    assert expected_calibration_error(p, y, bins=2) == 0.0
    assert expected_calibration_error(1 - p, y, bins=2) == 1.0


def test_auroc_counts_ties_half() -> None:
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert auroc([4, 3, 2, 1], [0, 0, 1, 1]) == 0.0
    assert auroc([1, 1, 1, 2], [0, 1, 0, 1]) == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert np.isnan(auroc([1, 2], [1, 1]))


def test_queries_that_look_alike_get_their_share_of_hits() -> None:
    features = np.repeat([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 500, axis=0)
    correct = np.array(([1] * 2 + [0] * 8) * 50 + ([1] * 7 + [0] * 3) * 50)
    p = Confidence.fit(features, correct, 20).predict(features)
    np.testing.assert_allclose(p, np.repeat([0.2, 0.7], 500))


def test_few_events_are_not_learnt_by_heart() -> None:
    rng = np.random.default_rng(4)
    loss = []
    for _ in range(10):
        confidence, (features, correct) = Confidence.fit(*draw(rng, 100), 20), draw(rng, 1000)
        p = confidence.predict(features)
        truth = 1 / (1 + np.exp(-(2 * features[:, 0] - features[:, 1])))
        loss.append(np.mean((p - correct) ** 2) - np.mean((truth - correct) ** 2))
    assert np.mean(loss) < 0.01  # a step function through the same 100 events: 0.012 to 0.019 over seeds


def test_a_longer_list_counts_as_its_best_and_a_much_shorter_one_is_not_judged() -> None:
    rng = np.random.default_rng(2)
    confidence = Confidence.fit(*draw(rng, 300), 4)
    scores, r = np.array([3.0, 2.0, 1.0, 0.0]), np.array([0.9, 0.5, 0.2, 0.1])
    longer = confidence.of(np.append(scores, [-3.0] * 40), np.append(r, [0.0] * 40))
    assert longer == confidence.of(scores, r) is not None
    assert confidence.of(scores[:2], r[:2]) is not None
    assert confidence.of(scores[:1], r[:1]) is None


def test_few_events_never_make_certain() -> None:
    features = np.linspace(0, 1, 20)[:, None]
    p = Confidence.fit(features, features[:, 0] > 0.5, 20).predict([[-9.0], [9.0]])
    np.testing.assert_allclose(p, [1 / 22, 21 / 22])
