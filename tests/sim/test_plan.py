"""``plan`` against the figures of the paper's run and of real runs' own counters."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from common.config import Config
from common.configio import from_flat, read_config
from common.errors import UserError
from sim import plan as plan_module
from sim.plan import plan, show_plan

PAPER = Path(__file__).resolve().parents[2] / "configs" / "paper.toml"


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Plans of known sizes read neither tables nor weights."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a plan has read data or weights")

    monkeypatch.setattr(plan_module, "load_samples", refuse)
    monkeypatch.setattr("common.model.backbone.load_model", refuse)


@pytest.mark.parametrize(("rank", "b"), [(16, 2_621_440), (32, 5_242_880)])
def test_the_papers_run_fits_its_card_without_recomputation(rank, b):
    found = plan(read_config(PAPER, [f"adapter.rank={rank}"]), card_bytes=48_000_000_000)
    assert found["parameters"]["b"] == b
    assert found["parameters"]["backbone"] == 8_030_261_248
    assert found["steps"] == 4875
    assert found["batch_tokens"] == 4 * 2048
    assert found["bytes_per_round"] == 2 * 4 * b
    assert found["fits"] is True
    assert found["recompute"]["value"] == "none"
    # The design's own estimate for this step is about 42 GB on the card.
    assert 41e9 < found["memory_bytes"]["total"] < 45e9
    parts = dict(found["memory_bytes"])
    assert parts.pop("total") == sum(parts.values())
    assert found["spare_bytes"] == 48_000_000_000 - found["memory_bytes"]["total"]
    json.dumps(found, allow_nan=False)


def test_a_smaller_card_recomputes_and_a_tiny_one_does_not_fit():
    config = read_config(PAPER)
    middle = plan(config, card_bytes=32_000_000_000)
    assert (middle["recompute"]["value"], middle["fits"]) == ("mlp", True)
    small = plan(config, card_bytes=16_000_000_000)
    assert (small["recompute"]["value"], small["fits"]) == ("all", False)
    assert small["spare_bytes"] < 0
    forced = plan(read_config(PAPER, ["train.recompute=none"]), card_bytes=32_000_000_000)
    assert forced["fits"] is False


def test_rounds_carry_b_down_and_up_for_every_hospital_that_is_asked():
    config = from_flat({"federation.hospitals": 10, "federation.fraction": 0.3})
    found = plan(config, card_bytes=10**12)
    assert found["bytes_per_round"] == 3 * 2 * 4 * found["parameters"]["b"]
    assert found["steps"] == config.federation.rounds * config.federation.local_steps
    lora = plan(from_flat({"federation.hospitals": 1, "adapter.mode": "lora"}), card_bytes=10**12)
    counts = lora["parameters"]
    assert lora["bytes_per_round"] == 2 * 4 * (counts["a"] + counts["b"])


def test_epochs_count_the_largest_hospital(monkeypatch):
    class Room:
        def __init__(self, samples):
            self.train = range(samples)

    class Rows:
        admissions = ()

    monkeypatch.setattr(plan_module, "load_samples", lambda config: Rows())
    monkeypatch.setattr(
        plan_module, "assign_hospitals", lambda *args, **kwargs: (Room(10), Room(17))
    )
    config = from_flat({"train.epochs": 2.0, "train.batch-size": 4})
    assert plan(config)["steps"] == 2 * 5


def test_privacy_stands_in_the_plan():
    config = from_flat(
        {"privacy.noise-multiplier": 1.0, "privacy.sampling-rate": 0.1, "train.device": "cpu"}
    )
    found, plain = plan(config), plan(from_flat({"train.device": "cpu"}))
    assert found["privacy"]["epsilon"] > 0
    more = found["memory_bytes"]["gradients"] - plain["memory_bytes"]["gradients"]
    assert more >= config.train.batch_size * 4 * found["parameters"]["b"]


def test_what_a_person_reads_names_the_verdict():
    out = io.StringIO()
    show_plan(Console(file=out, width=200), plan(read_config(PAPER), card_bytes=48_000_000_000))
    text = out.getvalue()
    assert "fits 48 GB: +4." in text
    assert "B 2,621,440" in text
    assert "4,875 steps" in text


def test_a_backbone_that_is_nowhere_is_the_users_to_mend():
    with pytest.raises(UserError, match="model.backbone"):
        plan(from_flat({"model.backbone": "nobody/nothing-at-all"}))
    assert plan(Config())["parameters"]["backbone"] == 134_515_008
