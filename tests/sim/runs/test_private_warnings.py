"""What a private run says before it spends epsilon: what ``fedrx plan`` says of it, once."""

import io

import pytest
from privacy_fixtures import PRIVATE_TINY

from common.configio import from_flat
from common.data.synthetic.write import write_tables
from common.rundir import RunDirectory
from sim.checks.plan import plan
from sim.cli.runs import show_plan
from sim.cli.terminal import Terminal
from sim.runs.federate import federate
from sim.runs.single import single

SOUND = {"privacy.expected-batch": 1e4, "privacy.most-patients": 400, "privacy.delta": 1e-5}
FEW = {"privacy.unit": "hospital", "privacy.sampling-rate": 1.0, "privacy.delta": 0.02}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder, patients=40, seed=0)
    return folder


def said_before_anything_is_written(begin, config, tmp_path, monkeypatch) -> list[str]:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "made", stop)
    shown = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        begin(
            config,
            console=Terminal(file=shown, width=500),
            command_line=[],
            run_dir=tmp_path / "run",
        )
    return shown.getvalue().splitlines()


@pytest.mark.parametrize("begin", [federate, single])
def test_a_run_says_what_plan_says_of_its_privacy(begin, tables, tmp_path, monkeypatch):
    monkeypatch.setattr("common.privacy.forecast.alternatives", lambda *_: [])  # dear to search
    keys = {**PRIVATE_TINY, "data.path": str(tables), "privacy.expected-batch": 2.0}
    config = from_flat({**keys, "evaluation.samples": 2})
    planned = io.StringIO()
    show_plan(Terminal(file=planned, width=500), plan(config))
    warned = [line for line in planned.getvalue().splitlines() if "compared with no" in line]
    warned += [line for line in planned.getvalue().splitlines() if "drowns the signal" in line]
    assert len(warned) == 2
    lines = said_before_anything_is_written(begin, config, tmp_path, monkeypatch)
    assert [lines.count(line) for line in warned] == [1, 1]


@pytest.mark.parametrize("begin", [federate, single])
def test_a_sound_plan_and_a_plain_run_are_not_warned_of(begin, tables, tmp_path, monkeypatch):
    for keys in (PRIVATE_TINY | SOUND, {"model.backbone": "tiny", "train.device": "cpu"}):
        config = from_flat({**keys, "data.path": str(tables), "evaluation.samples": 2})
        text = "".join(said_before_anything_is_written(begin, config, tmp_path, monkeypatch))
        assert "noise" not in text
        assert "delta" not in text


def test_few_hospitals_are_warned_of_once(tables, tmp_path, monkeypatch):
    config = from_flat({**PRIVATE_TINY, **FEW, "data.path": str(tables), "evaluation.samples": 2})
    lines = said_before_anything_is_written(federate, config, tmp_path, monkeypatch)
    (noise,) = (line for line in lines if "noise" in line)
    assert noise.startswith("hospital-level privacy: ")
    assert "nothing will be learnt" in noise
    assert "noise over signal" not in noise
    assert "10 x 3 hospitals" not in "".join(lines), "delta is the usual one"
