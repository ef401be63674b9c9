"""A run with prompts of the user's own: training, answers and lists all ask the same."""

from dataclasses import replace

import pytest

from common.config import TextConfig
from common.errors import UserError
from common.text import batches
from sim.answers.evaluate import evaluate_run
from sim.assist.patient_form import read_form
from sim.assist.suggest import Assistant, assistant_config, reference_of
from sim.checks.audit_membership import audit_membership
from sim.report.data_description import describe
from sim.runs.federate import federate
from sim.runs.resume import resume

TEXT = TextConfig(
    system_prompt="Name what was ordered.",
    template="A patient of {age}, ill with\n{diagnoses}\nWhat was ordered?",
)


@pytest.fixture
def asked(monkeypatch):
    """All prompts that anything turns into tokens."""
    seen = set()
    render = batches.prompt_tokens

    def noted(tokenizer, system, user):
        seen.add((system, user))
        return render(tokenizer, system, user)

    monkeypatch.setattr(batches, "prompt_tokens", noted)
    return seen


def require_own(seen):
    assert seen
    for system, user in seen:
        assert system == TEXT.system_prompt
        assert user.startswith("A patient of ")
        assert user.endswith("\nWhat was ordered?")
    seen.clear()


def test_everything_that_a_run_asks_is_the_user_s(tiny_config, tmp_path, asked):
    small = {"evaluation__samples": 2, "evaluation__max_new_tokens": 8}
    config = replace(tiny_config(**small, run__backend="in-process"), text=TEXT)
    folder = tmp_path / "run"
    run = federate(config, command_line=["fedrx"], run_dir=folder).directory
    require_own(asked)
    for method in ("generate", "score"):
        evaluate_run(run, overrides=[f"evaluation.method={method}"])
        require_own(asked)
    form = {"sex": "F", "age": "71", "diagnoses": ["I10"]}
    around = reference_of(config)
    assistant = Assistant(run, assistant_config(run), reference=around)
    assistant.suggest(read_form(form, around.index))
    require_own(asked)
    audit_membership(run)
    require_own(asked)
    describe(config)
    require_own(asked)
    with pytest.raises(UserError, match=r"text\.system-prompt: 'Name what was ordered\.' -> 'x'"):
        evaluate_run(run, overrides=["text.system-prompt=x"])
    with pytest.raises(UserError, match=r"text\.system-prompt"):
        resume(folder, command_line=["fedrx"], overrides=["text.system-prompt=x"])
