"""What a process imports from its start to its first step: nothing that it needs only later."""

import json
import subprocess
import sys

import pytest

RUN = """
import json, sys

import sim.assist.suggest, sim.process.early, sim.runs.export
import sim.runs.federate, sim.runs.paper, sim.runs.single
from common.config import Config, TrainConfig
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import open_session
from common.text.batches import Encoded
from common.training.gradients import BatchGradient

stages = [sorted(sys.modules)]
sim.process.early.check_settings(Config())
stages += [sorted(sys.modules)]
session = open_session(resolve_backbone("tiny"), AdapterSpec(rank=2), device="cpu", dtype="fp32")
sample = Encoded(input_ids=tuple(range(5, 25)), answer_start=15, unit=0)
BatchGradient([sample], TrainConfig(batch_size=1), "once")(session, 0)
print(json.dumps([*stages, sorted(sys.modules)]))
"""
AFTER_TRAINING = {"sklearn", "pandas", "matplotlib", "peft"}
"""Baselines, cut-offs, plots, exports."""
WHILE_WEIGHTS_COME = {"transformers", "scipy"}
"""Half of what a process imports: the weights are read beside it."""
TO_COMPUTE = {"transformers.modeling_utils", "torch._dynamo", "scipy"}
"""A run's first process and its server ask for shapes alone."""


@pytest.mark.process
def test_a_run_imports_late_what_it_needs_late():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    before, checked, at_the_first_step = map(set, json.loads(done.stdout))
    assert not before & (AFTER_TRAINING | WHILE_WEIGHTS_COME)
    assert not checked & (AFTER_TRAINING | WHILE_WEIGHTS_COME | TO_COMPUTE)
    assert "transformers.models.llama.modeling_llama" in at_the_first_step
    assert not at_the_first_step & AFTER_TRAINING


@pytest.mark.process
def test_flower_s_process_imports_the_apps_alone():
    """Each library would cost it seconds of a core; a hospital's work brings them to its own."""
    code = "import json, sys; import client.app, server.app; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "scipy", "polars", "opacus", *AFTER_TRAINING}
    assert not set(json.loads(done.stdout)) & heavy
