"""What keeps one hospital from deciding the model: bounds against the round's median."""

import numpy as np
import pytest

from common.config import FederationConfig
from common.wire.contract import Update
from server.screening import outliers, with_capped_weights
from server.strategy import Aggregator

KEY = "model.layers.0.self_attn.q_proj.lora_B"
START = {KEY: np.full((4, 3), 0.5, np.float32)}


def moved(hospital: str, norm: float, weight: float = 1.0) -> Update:
    """An update whose change of B has the given L2 norm."""
    change = np.random.default_rng(len(hospital)).normal(size=(4, 3))
    change *= norm / np.linalg.norm(change)
    b = {KEY: (START[KEY] + change).astype(np.float32)}
    return Update(hospital=hospital, b=b, weight=weight, metrics={})


def test_the_one_that_moved_too_far_is_accused_and_no_other() -> None:
    honest = [moved("a", 1.0), moved("bb", 2.0), moved("ccc", 0.5)]
    assert outliers(FederationConfig(), START, honest) == {}
    found = outliers(FederationConfig(), START, [*honest, moved("far", 400.0)])
    assert list(found) == ["far"]
    # median of 0.5, 1, 2, 400 is 1.5
    assert "267 times" in found["far"]


@pytest.mark.parametrize("liar", [0.0, 1e-6, 1e4, 1e8])
def test_a_minority_cannot_make_honest_hospitals_look_guilty(liar: float) -> None:
    honest = [moved(name, norm) for name, norm in (("a", 1.0), ("bb", 3.0), ("ccc", 9.0))]
    updates = [*honest, moved("liar", liar), moved("other-liar", liar)]
    assert not {"a", "bb", "ccc"} & set(outliers(FederationConfig(), START, updates))


def test_two_hospitals_have_no_majority_and_still_ones_no_scale() -> None:
    assert outliers(FederationConfig(), START, [moved("a", 0.1), moved("bb", 50.0)]) == {}
    still = [moved("a", 0.0), moved("bb", 0.0), moved("ccc", 1.0)]
    assert outliers(FederationConfig(), START, still) == {}
    off = FederationConfig(max_update_norm=0.0)
    assert outliers(off, START, [moved("a", 1), moved("bb", 1), moved("ccc", 1e6)]) == {}


def test_a_declared_weight_counts_at_most_three_times_the_median() -> None:
    updates = [moved("a", 1.0, 2.0), moved("bb", 2.0, 4.0), moved("ccc", 3.0, 9e7)]
    capped = with_capped_weights(FederationConfig(), updates)
    mean = Aggregator(FederationConfig()).aggregate(START, capped, server_round=1)[KEY]
    expected = np.average([u.b[KEY].astype(np.float64) for u in updates], 0, weights=[2, 4, 12])
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    uncapped = with_capped_weights(FederationConfig(max_weight_share=0.0), updates)
    assert uncapped == updates
