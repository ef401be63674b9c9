"""RoLoRA over a federation, against PEFT's model trained by a naive loop that alternates."""

import numpy as np
import peft
import pytest
import torch
from tampering import Killed, killed_in, on, round_of

from common.data.dataset import open_hospitals
from common.model.adapter.rolora import RoLoRA
from common.model.adapter.spec import draw_a
from common.model.backbone.load import load_model, resolve_backbone
from common.rundir import RunDirectory
from common.training.hospital_data import encode_hospital
from common.training.schedule import batch_order
from common.training.worker import Worker

PARTS = {1: "lora_B", 0: "lora_A"}
"""What a round trains and sends, by the rest of its number divided by two."""


def rolora(tiny_config, **keys):
    return tiny_config(**{"adapter__mode": "rolora", "federation__rounds": 4, **keys})


def peft_parameters(config):
    """PEFT's model with our A and B = 0, and its matrices by our wire keys."""
    plain = load_model(resolve_backbone("tiny"), device=torch.device("cpu"), dtype=torch.float32)
    targets = config.adapter.targets.split(",")
    lora = peft.LoraConfig(
        r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules=targets
    )
    model = peft.get_peft_model(plain, lora)
    matrices = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    spec = Worker().session(config).adapter.spec
    with torch.no_grad():
        for key, matrix in matrices.items():
            module, _, part = key.rpartition(".")
            drawn = draw_a(spec, module, matrix.shape[1]) if part == "lora_A" else 0 * matrix
            matrix.copy_(torch.as_tensor(drawn))
    return model, matrices


def naive(config, answered):
    """Alternate, train one sample at a time, average: {round: A and B} by plain torch.

    Args:
        config: Of the run.
        answered: {round: hospitals whose updates were aggregated}.
    """
    session = Worker().session(config)
    hospitals = open_hospitals(config).hospitals
    data = {one.name: encode_hospital(one, session, config).train for one in hospitals}
    model, matrices = peft_parameters(config)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.train.optimizer]
    optimizers, steps = {}, dict.fromkeys(data, 0)
    world = {key: matrix.detach().clone() for key, matrix in matrices.items()}
    after = {}
    for number in range(1, config.federation.rounds + 1):
        part = PARTS[number % 2]
        half = {key: matrix for key, matrix in matrices.items() if key.endswith(part)}
        total = {key: torch.zeros_like(matrix, dtype=torch.float64) for key, matrix in half.items()}
        weight = sum(len(data[name]) for name in answered[number])
        for name in answered[number]:
            for key, matrix in matrices.items():
                matrix.requires_grad_(key in half).data.copy_(world[key])
            if (name, part) not in optimizers:
                optimizers[name, part] = kind(
                    half.values(), lr=config.train.learning_rate, weight_decay=0.0
                )
            for _ in range(config.federation.local_steps):
                size = config.train.batch_size
                order = batch_order(0, name, len(data[name]), steps[name] * size, size)
                batch = [data[name][place] for place in order]
                labels = sum(len(one.input_ids) - one.answer_start for one in batch)
                optimizers[name, part].zero_grad()
                for one in batch:
                    ids = torch.tensor([one.input_ids])
                    logits = model(input_ids=ids).logits[0, one.answer_start - 1 : -1]
                    answer = ids[0, one.answer_start :]
                    loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
                    (loss / labels).backward()
                optimizers[name, part].step()
                steps[name] += 1
            for key, matrix in half.items():
                total[key] += matrix.detach().double() * len(data[name]) / weight
        world |= {key: value.float() for key, value in total.items()}
        after[number] = {key: value.numpy().copy() for key, value in world.items()}
    return after


def answered(run, rounds):
    events = run.metrics("weight")
    return {
        number: sorted(e.hospital for e in events if e.round == number)
        for number in range(1, rounds + 1)
    }


def difference(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)


SGD = {"train__optimizer": "sgd", "train__learning_rate": 1.0}


@pytest.fixture(scope="module")
def expected(tiny_config):
    config = rolora(tiny_config, **SGD)
    names = [f"hospital-{place}" for place in (1, 2, 3)]
    return naive(config, dict.fromkeys(range(1, 5), names))


def test_four_rounds_equal_a_naive_loop_on_pefts_model(tiny_config, in_process, expected):
    done = in_process(rolora(tiny_config, **SGD))
    started = done.run.load_checkpoint("round-00000").b
    for number in range(1, 5):
        held = done.run.load_checkpoint(f"round-{number:05d}").b
        assert difference(held, expected[number]) < 2e-6
        moved = {key.rpartition(".")[2] for key in held if np.any(held[key] != started[key])}
        assert moved == {PARTS[number % 2]}  # the other half is as it was, to the last bit
        assert max(float(np.abs(held[k] - started[k]).max()) for k in held) > 1e-3
        started = held
    lines = done.run.wire()
    for line in lines:
        parts = {name.rpartition(".")[2] for name in line.tensors}
        if line.direction == "down" and line.kind != "query":
            assert parts == {"lora_A", "lora_B"}
        elif line.kind == "train" and line.direction == "up":
            assert parts == {PARTS[line.round % 2]}
    assert done.summary["trainable_parameters"] == sum(value.size for value in started.values())


def test_b_sent_every_round_is_another_thing(tiny_config, in_process, monkeypatch, expected):
    """The oracle above tells them apart: A is trained in round 2 and thrown away."""
    monkeypatch.setattr(RoLoRA, "sends", lambda scheme, number: ("lora_B",))
    held = in_process(rolora(tiny_config, **SGD)).run.load_checkpoint().b
    assert difference(held, expected[4]) > 1e-3


def test_who_joins_late_has_what_the_others_have(tiny_config, in_process):
    """Two of three hospitals a round, one of them away until A and B have both changed."""
    config = rolora(tiny_config, **SGD, federation__fraction=0.67, federation__min_hospitals=2)
    done = in_process(config, online=lambda index, seen: index != 2 or seen >= 2)
    met = answered(done.run, 4)
    assert "hospital-3" not in [*met[1], *met[2]]
    assert "hospital-3" in [*met[3], *met[4]]
    assert difference(done.run.load_checkpoint().b, naive(config, met)[4]) < 2e-6


@pytest.mark.parametrize(
    "keys",
    [
        {"federation__strategy": "fedadam", "federation__server_learning_rate": 0.05},
        {"federation__strategy": "fedavgm", "federation__server_momentum": 0.9},
        {"federation__codec": "int8"},
    ],
    ids=["fedadam", "fedavgm", "int8"],
)
def test_a_resumed_run_ends_in_the_same_a_and_b(tiny_config, in_process, tmp_path, keys):
    """With AdamW at the hospitals and state at the server, each half's its own."""
    config = rolora(tiny_config, **keys)
    whole = in_process(config)

    with pytest.raises(Killed):
        in_process(config, on_message=killed_in(2, 1))
    run = RunDirectory(tmp_path / "run-2")
    with pytest.raises(Killed):
        in_process(run.config(), resume=run, on_message=killed_in(3, 1))
    assert run.checkpoint_names()[-1] == "round-00002"
    assert in_process(run.config(), resume=run).sha == whole.sha


@pytest.mark.parametrize("number", [1, 2])
def test_the_other_half_is_refused(tiny_config, in_process, number):
    """A hospital that sends what the round does not train breaks the contract."""

    def both(message, reply):
        if round_of(message) == number:
            arrays = next(iter(reply.content.array_records.values()))
            down = next(iter(message.content.array_records.values()))
            key = next(key for key in down if key not in arrays)
            arrays[key] = down[key]
        return reply

    done = in_process(rolora(tiny_config, federation__rounds=2), tamper={1: on("train", both)})
    refused = [(r, name, reason.split("lora_")[1][:1]) for r, name, reason in done.refused()]
    assert refused == [(number, "hospital-2", "A" if number == 1 else "B")]


@pytest.mark.parametrize("unit", ["patient", "hospital"])
def test_private_rounds_move_one_half_at_a_time(tiny_config, in_process, quick_accounting, unit):
    """What a round releases is the half that it trains: the other stays to the last bit."""
    done = in_process(
        rolora(
            tiny_config,
            privacy__noise_multiplier=1.2,
            privacy__sampling_rate=0.5,
            privacy__delta=0.001,
            privacy__unit=unit,
            federation__weighting="uniform",
        )
    )
    before = done.run.load_checkpoint("round-00000").b
    for number in range(1, 5):
        after = done.run.load_checkpoint(f"round-{number:05d}").b
        still = {key for key in after if np.array_equal(after[key], before[key])}
        assert {key.rpartition(".")[2] for key in still} == {PARTS[(number + 1) % 2]}
        assert len(still) == len(after) // 2
        before = after
    # How many tokens a private round has seen follows from the patients that were drawn.
    assert done.summary["tokens_per_second"] is None or unit == "hospital"
    steps = 4 if unit == "hospital" else 8
    assert {line["steps"] for line in done.run.lines("privacy.jsonl")} >= {steps}
