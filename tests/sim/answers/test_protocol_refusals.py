"""Verbs that cannot serve a run of another protocol say so in one line."""

import pytest

from common.config import Config, DataConfig
from common.configio import to_toml
from common.errors import UserError
from common.rundir import RunDirectory
from sim.answers.judge import prepare
from sim.answers.review import make_review
from sim.assist.suggest import assistant_config


@pytest.fixture(params=["visits", "first-24h"])
def run(request, tmp_path):
    config = Config(data=DataConfig(protocol=request.param))
    (tmp_path / "config.toml").write_text(to_toml(config))
    return RunDirectory(tmp_path)


def test_one_patients_form_holds_too_little(run):
    with pytest.raises(UserError, match="run has data.protocol=.*one patient's form") as caught:
        assistant_config(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb", [prepare, make_review])
def test_a_list_without_diagnoses_is_not_judged(run, verb):
    if run.config().data.protocol == "first-24h":
        with pytest.raises(UserError, match="judged by its stay's diagnoses") as caught:
            verb(run)
        assert caught.value.allowed == "a run with data.protocol=admission or visits"
    else:
        with pytest.raises(UserError) as caught:
            verb(run)
        assert "protocol" not in str(caught.value)
