"""What a hospital keeps: one flipped bit in it is refused with one line."""

import numpy as np
import pytest
import torch

from client.kept_state import (
    STEPS,
    forget_steps,
    keep,
    kept_steps,
    load_kept,
    load_state,
    save_state,
)
from common.errors import UserError
from common.files import json_line
from common.tensor_files import Altered
from common.training.optimiser import TrainState


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        state = TrainState(step=4 * number, optimizer={"exp_avg": torch.full((5,), 0.25 * number)})
        save_state(tmp_path, state, server_round=number)
    return tmp_path


def test_the_state_of_the_round_before_comes_back(folder):
    state = load_state(folder, before_round=3)
    assert state.step == kept_steps(folder) == 8
    assert torch.equal(state.optimizer["exp_avg"], torch.full((5,), 0.5))
    assert load_state(folder, before_round=2).step == 4
    assert load_state(folder, before_round=1).step == 0


@pytest.mark.parametrize("place", [-1, -10, 20])
def test_an_altered_optimizer_state_is_refused(folder, place):
    flip(folder / "state-00002.safetensors", place)
    with pytest.raises(Altered, match=r"^state-00002.safetensors is damaged"):
        load_state(folder, before_round=3)
    # The steps that a private hospital proves by it: neither fewer nor more are believed.
    with pytest.raises(Altered):
        kept_steps(folder)
    assert load_state(folder, before_round=2).step == 4


def test_an_altered_carried_rest_is_refused(folder):
    keep(folder, "carried", {"b": np.ones((2, 2), np.float32)}, server_round=1)
    assert np.array_equal(load_kept(folder, "carried", before_round=2)["b"], np.ones((2, 2)))
    flip(folder / "carried-00001.safetensors", -1)
    with pytest.raises(Altered, match=r"^carried-00001.safetensors is damaged"):
        load_kept(folder, "carried", before_round=2)


def test_steps_of_earlier_rounds_stay_as_they_are_and_a_damaged_line_is_named(tmp_path):
    lines = [
        json_line({"round": number, "step": number, "loss": 0.5, "seconds": 0.25})
        for number in (1, 2)
    ]
    file = tmp_path / STEPS
    file.write_text("".join(lines) + '{"round": 3')
    forget_steps(tmp_path, from_round=2)
    assert file.read_text() == lines[0]
    file.write_text(json_line({"round": "Quux", "step": 1, "loss": None, "seconds": 0.25}))
    with pytest.raises(UserError, match=r"^steps.jsonl: round: ") as refused:
        forget_steps(tmp_path, from_round=2)
    assert "Quux" not in str(refused.value)
