"""``plan`` against the figures of the paper's run and of real runs' own counters."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config import Config
from common.configio import from_flat, read_config
from common.errors import UserError
from common.model.adapter.layout import adapter_spec, meta_adapter
from common.model.backbone.load import resolve_backbone
from common.wire.codecs import encode
from sim.checks import plan as plan_module
from sim.checks.plan import PARTS
from sim.cli.runs import show_plan
from sim.cli.terminal import Terminal

PAPER = Path(__file__).resolve().parents[3] / "configs" / "paper.toml"


def plan(config, **options):
    return plan_module.plan(config, **options).as_json()


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Plans of known sizes read neither tables nor weights."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a plan has read data or weights")

    monkeypatch.setattr(plan_module, "open_hospitals", refuse)
    monkeypatch.setattr("common.model.backbone.load.load_model", refuse)


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


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("mode", ["fa-lora", "lora", "rolora"])
def test_bytes_are_those_of_encoded_tensors(codec, mode):
    """Against every tensor of the tiny backbone's adapter, encoded."""
    config = from_flat(
        {
            "model.backbone": "tiny",
            "adapter.mode": mode,
            "federation.codec": codec,
            "federation.hospitals": 5,
            "federation.fraction": 0.5,
            "federation.rounds": 5,
        }
    )
    shapes = meta_adapter(resolve_backbone("tiny"), adapter_spec(config.adapter)).shapes
    each = {key: encode(codec, np.ones(shape, np.float32)).nbytes for key, shape in shapes.items()}
    message = down = up = sum(each.values())
    if mode == "rolora":  # three rounds of B and two of A
        halves = [sum(n for key, n in each.items() if key.endswith(p)) for p in ("B", "A")]
        up = round((3 * halves[0] + 2 * halves[1]) / 5)
        message = (down + up) / 2
    assert plan(config)["bytes_per_round"] == 3 * (down + up)
    alone = replace(config, federation=replace(config.federation, only="hospital-2"))
    assert plan(alone)["bytes_per_round"] == 2 * message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("adapter.targets", "q_proj,bogus", "no layer has bogus"),
        ("adapter.targets", "lm_head", "no layer has lm_head"),
        ("train.device", "banana", "train.device='banana'"),
        ("train.checkpoint-steps", "abc", "train.checkpoint-steps='abc'"),
        ("federation.only", "nosuch", "only=nosuch; allowed: hospital-1 to hospital-3"),
        ("federation.strategy", "krum", "krum .* withstands nobody among 3 hospitals"),
        ("train.steps", 2, "2 steps .* for federation.rounds=4"),
    ],
)
def test_what_a_run_would_refuse_is_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        plan(from_flat({"model.backbone": "tiny", key: value}))


def test_a_personal_b_doubles_the_steps_and_costs_no_epsilon(monkeypatch):
    monkeypatch.setattr("common.privacy.forecast.alternatives", lambda *_: [])  # dear to search
    keys = {"model.backbone": "tiny", "privacy.noise-multiplier": 1.0, "train.steps": 8}
    without, found = (plan(from_flat({**keys, "adapter.personal": own})) for own in (False, True))
    assert (without["steps"], found["steps"]) == (8, 16)
    assert found["steps_reason"] == f"train.steps; {plan_module.OWN_STEPS}"
    assert found["privacy"] == without["privacy"]
    assert found["bytes_per_round"] == without["bytes_per_round"]
    alone = {**keys, "federation.hospitals": 1, "adapter.personal": True}
    assert plan(from_flat(alone))["steps"] == 8


def test_one_node_takes_fewer_steps_than_rounds():
    keys = {"model.backbone": "tiny", "federation.hospitals": 1, "train.steps": 2}
    assert plan(from_flat(keys))["steps"] == 2


def test_an_orthonormal_a_is_no_wider_than_its_module():
    keys = {"model.backbone": "tiny", "adapter.initialiser": "orthonormal"}
    with pytest.raises(UserError, match="adapter.rank=65"):
        plan(from_flat({**keys, "adapter.rank": 65}))
    assert plan(from_flat({**keys, "adapter.rank": 64}))["parameters"]["b"]


def test_answering_alone_may_not_fit():
    config = from_flat({"model.backbone": "tiny", "evaluation.batch-size": 4096})
    found = plan(config)
    training, answering = found["memory_bytes"]["total"], found["generation_bytes"]
    assert training < answering
    between = plan(config, card_bytes=(training + answering) // 2)
    assert (between["fits"], between["spare_bytes"] < 0) == (False, True)


def test_a_target_named_twice_counts_once():
    once, twice = (
        plan(from_flat({"model.backbone": "tiny", "adapter.targets": targets}))
        for targets in ("q_proj", "q_proj,q_proj")
    )
    assert once["parameters"] == twice["parameters"]


def test_epochs_count_the_largest_hospital(monkeypatch):
    class Room:
        def __init__(self, samples):
            self.train = range(samples)

    class Opened:
        hospitals = (Room(10), Room(17))

    monkeypatch.setattr(plan_module, "open_hospitals", lambda config: Opened())
    config = from_flat({"train.epochs": 2.0, "train.batch-size": 4})
    assert plan(config)["steps"] == 2 * 5


@pytest.mark.slow
def test_privacy_stands_in_the_plan():
    config = from_flat(
        {"privacy.noise-multiplier": 1.0, "privacy.sampling-rate": 0.1, "train.device": "cpu"}
    )
    found, plain = plan(config), plan(from_flat({"train.device": "cpu"}))
    assert found["privacy"]["epsilon"] > 0
    more = found["memory_bytes"]["gradients"] - plain["memory_bytes"]["gradients"]
    assert more >= config.train.batch_size * 4 * found["parameters"]["b"]


@pytest.mark.slow
def test_noise_is_weighed_against_everything_that_is_trained():
    keys = {"model.backbone": "tiny", "privacy.noise-multiplier": 1.0}
    for mode in ("fa-lora", "lora"):
        config = from_flat({**keys, "adapter.mode": mode})
        found = plan(config)
        trained = found["parameters"]["b"] + (found["parameters"]["a"] if mode == "lora" else 0)
        by_hand = trained**0.5 / config.privacy.expected_batch
        assert found["privacy"]["noise_to_signal"] == pytest.approx(by_hand)


@pytest.mark.slow
def test_hospital_level_privacy_stands_in_the_plan_too():
    config = from_flat(
        {
            "model.backbone": "tiny",
            "privacy.noise-multiplier": 1.0,
            "privacy.unit": "hospital",
            "federation.hospitals": 4,
        }
    )
    found = plan(config)
    assert found["privacy"]["unit"] == "hospital"
    assert found["privacy"]["steps"] == config.federation.rounds
    by_hand = found["parameters"]["b"] ** 0.5 / 4
    assert found["privacy"]["noise_to_signal"] == pytest.approx(by_hand)


def shown(found) -> str:
    out = io.StringIO()
    show_plan(Terminal(file=out, width=200), found)
    return out.getvalue()


def test_what_a_person_reads_names_the_verdict():
    text = shown(plan_module.plan(read_config(PAPER), card_bytes=48_000_000_000))
    assert "fits 48 GB: +5." in text
    assert "B 2,621,440" in text
    assert "4,875 steps" in text
    assert "validation sends B down once more" in text


def test_every_part_is_explained_and_none_of_nothing_is_shown():
    """The rows add up to the total as far as the two figures behind the point go."""
    found = plan_module.plan(read_config(PAPER), card_bytes=48_000_000_000)
    assert set(PARTS) == set(found.memory_bytes)
    text = shown(found)
    rows = [line.split("│")[1:4] for line in text.splitlines() if line.startswith("│")]
    sizes = {name.strip(): float(size) for name, size, _ in rows}
    assert min(sizes.values()) > 0
    left_out = set(found.memory_bytes) - set(sizes)
    assert "optimizer" in left_out  # plain SGD keeps nothing
    assert all(found.memory_bytes[name] < 5_000_000 for name in left_out)
    assert sum(sizes.values()) == pytest.approx(2 * sizes["total"], abs=0.06)
    assert all(why.strip() == PARTS[name.strip()] for name, _, why in rows)


def test_a_backbone_that_is_nowhere_is_the_users_to_mend():
    with pytest.raises(UserError, match="model.backbone"):
        plan(from_flat({"model.backbone": "nobody/nothing-at-all"}))
    assert plan(Config())["parameters"]["backbone"] == 134_515_008


def test_a_measured_card_says_how_long(monkeypatch):
    """Against the record of the measurement; nothing is said of what was not measured."""
    results = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
    cases = json.loads((results / "gpu_paper_run.json").read_text())["cases"]

    def fastest(who, weights="bf16"):
        speeds = [
            case["tokens_per_second"]
            for case in cases
            if case["workload"] == "full"
            and case["who"] == who
            and case.get("weights", weights) == weights
        ]
        return max(speeds)

    monkeypatch.setattr(plan_module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("common.privacy.forecast.alternatives", lambda *_: [])  # dear to search
    found = plan(read_config(PAPER))
    (row,) = found["measured"]
    assert row["card"] == "NVIDIA H200"
    assert row["seconds_per_step"] == pytest.approx(8192 / fastest("ours"), rel=0.02)
    assert row["hours"] == pytest.approx(found["steps"] * row["seconds_per_step"] / 3600)
    (row,) = plan(read_config(PAPER, ["model.weights=fp8"]))["measured"]
    assert row["seconds_per_step"] == pytest.approx(8192 / fastest("ours", "fp8"), rel=0.02)
    private = {
        "model.backbone": "meta-llama/Llama-3.1-8B-Instruct",
        "train.max-length": 2048,
        "privacy.noise-multiplier": 1.0,
        "privacy.expected-batch": 20.0,
    }
    (row,) = plan(from_flat(private))["measured"]
    assert row["seconds_per_step"] == pytest.approx(
        40960 / fastest("ours, private, one pass"), rel=0.02
    )
    (own,) = plan(from_flat({**private, "adapter.personal": True}))["measured"]
    assert own["seconds_per_step"] == row["seconds_per_step"]
    both = 40960 / fastest("ours, private, one pass") + 8192 / fastest("ours")
    assert own["hours"] == pytest.approx(3 * 40 * both / 3600, rel=0.02)
    for change in ("model.backbone=embedded", "model.weights=nf4", "train.recompute=all"):
        assert plan(read_config(PAPER, [change]))["measured"] == []
    assert "measured" not in plan(read_config(PAPER, ["train.device=cpu"]))
