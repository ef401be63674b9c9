"""Delta is held to public numbers alone."""

from fractions import Fraction
from typing import Any

import pytest

from common.config import Config
from common.configio import from_flat
from common.errors import UserError
from common.privacy.settings import delta_note, delta_warning, plan_of
from sim.checks.plan import plan
from sim.cli.runs import show_plan
from sim.cli.terminal import Terminal
from sim.runs.federate import resolved
from sim.runs.single import one_node

PRIVATE = {"privacy.noise-multiplier": 1.0, "federation.hospitals": 40}
STATED = {"data.path": "/tables", "privacy.most-patients": 500}


def config(**more: Any) -> Config:
    return from_flat({**PRIVATE, "model.backbone": "tiny", "train.device": "cpu", **more})


@pytest.mark.parametrize(
    ("keys", "units"),
    [
        (STATED, 500),
        ({"data.path": "synthetic", "data.synthetic-patients": 80}, 80),
        ({"data.synthetic-patients": 80, "privacy.most-patients": 30}, 30),
        ({"privacy.unit": "admission", **STATED}, 500),
        ({"privacy.unit": "hospital", "data.path": "/tables"}, 40),
    ],
)
def test_delta_is_refused_from_one_over_the_units_and_warned_of_from_a_tenth(keys, units) -> None:
    """To publish one record of n, chosen at random, is (0, 1 / n)-private."""
    refused = float(Fraction(1, units))
    for delta in (refused, refused * 1.01):
        with pytest.raises(UserError, match=rf"among up to {units} .*less than 1 / {units};"):
            plan_of(config(**keys, **{"privacy.delta": delta}))
    large = config(**keys, **{"privacy.delta": refused * 0.99})
    assert plan_of(large).delta == large.privacy.delta
    assert f"10 x {units} " in delta_warning(large)
    assert delta_note(large) == delta_warning(large)
    assert delta_warning(config(**keys, **{"privacy.delta": refused / 9.9}))
    usual = config(**keys, **{"privacy.delta": refused / 10})
    assert delta_warning(usual) == ""
    assert "is at most 1 / (10 x" in delta_note(usual)


@pytest.mark.parametrize("keys", [{}, {"run.hospital-keys": "/keys", "data.path": "synthetic"}])
def test_where_nothing_is_public_nothing_is_decided_and_that_is_said(keys) -> None:
    """How many patients a folder or a deployment's hospitals hold is private."""
    unknown = config(**{"data.path": "/tables", "privacy.delta": 0.1, **keys})
    assert plan_of(unknown).delta == 0.1
    assert "private; state a public bound" in delta_warning(unknown)
    assert delta_note(unknown) == delta_warning(unknown)


def test_without_privacy_delta_is_not_looked_at() -> None:
    assert delta_warning(config(**{"privacy.noise-multiplier": 0.0, "privacy.delta": 0.1})) == ""


def test_the_bound_is_no_part_of_the_plan() -> None:
    """Ledgers name the plan: a bound that is stated later must not shut them out."""
    with_bound, without = (config(**{"data.path": "/t", **keys}) for keys in (STATED, {}))
    assert plan_of(with_bound).fingerprint == plan_of(without).fingerprint


def test_plan_federate_and_single_refuse_it() -> None:
    bad = config(**{"data.synthetic-patients": 20, "privacy.delta": 0.06})
    for verb in (plan, resolved, one_node):
        with pytest.raises(UserError, match="protects nobody"):
            verb(bad)


@pytest.mark.parametrize(("delta", "said"), [(0.01, "is above 1 /"), (0.001, "is at most 1 /")])
def test_plan_says_what_delta_means(delta, said, monkeypatch) -> None:
    monkeypatch.setattr("common.privacy.forecast.alternatives", lambda *_: [])  # dear to search
    console = Terminal(record=True, width=200)
    show_plan(console, plan(config(**{"data.synthetic-patients": 80, "privacy.delta": delta})))
    text = console.export_text()
    assert said in text
    assert "sends B down" not in text, "nobody is asked to validate with privacy"
