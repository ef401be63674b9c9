"""What is refused before data is read, and what is not tried for it."""

import pytest

from common.config import Config
from common.configio import from_flat
from common.errors import SettingError
from common.model.kernels import attention
from sim.process import early


def test_no_kernel_is_tried_for_auto(monkeypatch):
    """It takes seconds and memory of a GPU from a process that trains nothing."""

    def refuse(*_arguments):
        raise AssertionError("a kernel was tried")

    monkeypatch.setattr(early, "choose_attention", refuse)
    monkeypatch.setattr(attention, "obstacle", refuse)
    early.check_device(Config())


def test_a_kernel_that_is_named_is_checked():
    named = {"train.device": "cpu", "model.attention": "sdpa"}
    early.check_device(from_flat(named))
    config = from_flat({**named, "model.attention": "cudnn"})
    with pytest.raises(SettingError, match="model.attention=cudnn cannot run here"):
        early.check_device(config)
