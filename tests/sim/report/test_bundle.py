"""The bundle read back as an RO-Crate, and what must not be in it."""

import datetime
import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config import Config, DataConfig, JudgeConfig, PrivacyConfig, RunConfig, TrainConfig
from common.errors import UserError
from common.privacy.budget.receipts import PrivacyLine
from common.records.run import RunRecord
from common.rundir import RunDirectory
from sim.cli.main import app
from sim.report.bundle import METADATA, contents, write_bundle


def receipt(hospital):
    return PrivacyLine(
        hospital=hospital,
        round=1,
        sampling_rate=0.1,
        noise_multiplier=1.0,
        clip_norm=1.0,
        steps=2,
        epsilon=0.5,
        delta=1e-5,
        unit="patient",
        accountant="rdp",
    )


def make_run(folder, *, name="trial", hospital="hospital-1", noise=0.0, seed=0):
    config = Config(
        train=TrainConfig(seed=seed),
        privacy=PrivacyConfig(noise_multiplier=noise),
        data=DataConfig(path=str(folder / "secret-place" / "mimic")),
        run=RunConfig(
            name=name,
            directory=str(folder / "run"),
            tracker_url="http://curves.st-elsewhere:5000",
            tracker_agreement="contract with St Elsewhere",
        ),
        judge=JudgeConfig(base_url="http://user:word@llm.st-elsewhere:8000/v1"),
    )
    run = RunDirectory.create(config, directory=folder / "run")
    run.write_json("run.json", RunRecord(mode="federation", resumable=True))
    run.write_json(
        "environment.json",
        {
            "python": "3.11.2",
            "versions": {"torch": "2.12.0"},
            "command_line": ["fedrx", "federate", "--set", f"data.path={folder}"],
            "prompt_date": "2024-07-26",
        },
    )
    run.write_json(
        "summary.json",
        {
            "source": "credentialed",
            "seconds": 12.5,
            "backbone": {"name": str(folder / "secret-place" / "llama"), "fingerprint": "f"},
            "hospitals": [{"name": hospital, "patients": 10000001, "samples": 9}],
            "metrics": {"fedrx": {"f1": 0.25, "samples": 9}},
            "wire": {"tensors": ["B"], "bytes_up": 21000000, "bytes_down": 21000000},
            "review": {
                "reviewers": ["Dr. Anna Secret"],
                "cases": 3,
                "agreement": {"alpha_drugs": None},
            },
        },
    )
    run.write_json("data.json", {"counts": {"patients": 77}})
    run.metric("validation-loss", 2.5, round=1, hospital=hospital)
    run.append("predictions.jsonl", {"case": "case-0001", "truth": ["row-secret"]})
    run.append("privacy.jsonl", receipt(hospital))
    return run


def test_the_crate_is_read_back_with_its_files(tmp_path):
    pytest.importorskip("rocrate")
    from rocrate.rocrate import ROCrate

    run = make_run(tmp_path)
    folder = write_bundle(run)
    assert folder == run.path / "bundle"
    crate = ROCrate(folder)
    listed = {entity.id for entity in crate.data_entities}
    assert listed == {p.name for p in folder.iterdir()} - {METADATA}
    assert listed == {
        *("config.toml", "environment.json", "data.json", "figures.json"),
        *("metrics.jsonl", "privacy.jsonl"),
    }
    assert all(entity["encodingFormat"] for entity in crate.data_entities)
    assert "not for clinical use" in crate.description
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["metrics"]["fedrx"]["f1"] == 0.25
    assert figures["seconds"] == 12.5
    assert figures["backbone"]["name"] == "llama"
    (event,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (event["value"], "time" in event) == (2.5, False)
    config = tomllib.loads((folder / "config.toml").read_text())
    assert config["data"]["path"] == "DATA"
    assert config["run"]["name"] == "trial"


def test_no_row_place_time_or_name_of_a_person_is_in_it(tmp_path):
    pytest.importorskip("rocrate")
    folder = write_bundle(make_run(tmp_path), tmp_path / "out")
    texts = "".join(p.read_text(encoding="utf-8") for p in folder.iterdir())
    secrets = ("row-secret", "case-0001", str(tmp_path), "secret-place", "Anna", "2024-07-26")
    for secret in (*secrets, "lsewhere", "user:word"):
        assert secret not in texts


@pytest.mark.parametrize(
    "name",
    [
        *("patient-10000032", "22595853", "of 2180-05-06", "6.5.2180"),
        # The data is not on this machine: eICU's and MEDS' ids are looked for too.
        *("002-10009", "stay 141168", "3353263", "subject-123456789"),
    ],
)
@pytest.mark.parametrize("where", ["name", "hospital"])
def test_what_looks_like_an_id_or_a_date_stops_the_bundle(tmp_path, name, where):
    pytest.importorskip("rocrate")
    run = make_run(tmp_path, **{where: name})
    with pytest.raises(UserError, match="looks like an? (id|date): nothing was written") as caught:
        write_bundle(run)
    assert name not in str(caught.value)
    assert not (run.path / "bundle").exists()
    assert {p.name for p in run.path.iterdir()}.isdisjoint({"bundle", ".bundle"})


def test_ids_are_those_of_the_runs_own_source(tmp_path):
    """Tables of MIMIC-IV's form: a number of six digits is none of theirs."""
    pytest.importorskip("rocrate")
    (tmp_path / "secret-place" / "mimic" / "hosp").mkdir(parents=True)
    run = make_run(tmp_path, name="tried-200000-steps")
    assert write_bundle(run).is_dir()
    (tmp_path / "secret-place" / "mimic" / "hosp").rmdir()
    (tmp_path / "secret-place" / "mimic" / "patient.csv").touch()
    with pytest.raises(UserError, match="looks like an id"):
        write_bundle(run)


def test_a_file_is_no_folder_for_a_bundle(tmp_path):
    pytest.importorskip("rocrate")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt is a file; allowed: a folder"):
        write_bundle(make_run(tmp_path), tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_root_has_a_day_and_says_whose_license_it_is(tmp_path):
    pytest.importorskip("rocrate")
    from rocrate.rocrate import ROCrate

    folder = write_bundle(make_run(tmp_path), today=lambda: datetime.date(2026, 2, 3))
    written = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    (root,) = [one for one in written["@graph"] if one["@id"] == "./"]
    assert root["datePublished"] == "2026-02-03"
    license = ROCrate(folder).root_dataset["license"]
    assert license["name"] == "The authors of the run decide"
    assert "Apache-2.0" in license["description"]


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("summary.json", '{"metrics": "secret"}', "metrics"),
        ("environment.json", '{"resumed": "secret"}', "resumed"),
        ("data.json", '{"hospitals": "secret"}', "hospitals"),
        ("metrics.jsonl", '{"name": ["secret"], "value": 1, "time": 1}\n', "name"),
        ("privacy.jsonl", '{"round": "secret"}\n', "hospital"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_key(tmp_path, name, content, key):
    run = make_run(tmp_path)
    (run.path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: {key}: ") as refused:
        contents(run)
    assert "secret" not in str(refused.value)


def test_a_private_runs_bundle_counts_nobody(tmp_path):
    pytest.importorskip("rocrate")
    run = make_run(tmp_path, noise=1.0)
    summary = run.read_json("summary.json")
    cutoffs = {"fedrx": {"hospital-1": {"names": 249, "admissions": 12, "threshold": 0.1}}}
    evaluation = {**summary.get("evaluation", {}), "cutoffs": cutoffs}
    run.write_json("summary.json", {**summary, "evaluation": evaluation, "training_seconds": 21.7})
    run.metric("round-seconds", 3.826, round=1)
    run.metric("train-loss", None, step=1, gradient_norm=None, tokens=0, seconds=5.378)
    folder = write_bundle(run)
    figures = (folder / "figures.json").read_text(encoding="utf-8")
    told = figures + (folder / "metrics.jsonl").read_text(encoding="utf-8")
    for figure in ("cutoffs", "249", "21.7", "3.826", "5.378"):
        assert figure not in told
    assert '"train-loss"' in told
    assert not (folder / "data.json").exists()
    assert (folder / "privacy.jsonl").exists()


def test_counts_and_digests_are_no_ids(tmp_path):
    """Numbers of ours, versions and hashes of eight and more digits pass."""
    pytest.importorskip("rocrate")
    run = make_run(tmp_path, seed=20261126)
    summary = run.read_json("summary.json")
    run.write_json("summary.json", {**summary, "b_sha256": "1234567890" * 6 + "abcd"})
    assert write_bundle(run).is_dir()


def test_an_earlier_bundle_is_replaced_and_nothing_else(tmp_path):
    pytest.importorskip("rocrate")
    run = make_run(tmp_path)
    folder = write_bundle(run, tmp_path / "out")
    run.metric("validation-loss", 2.0, round=2)
    assert len((write_bundle(run, folder) / "metrics.jsonl").read_text().splitlines()) == 2
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        write_bundle(run, folder)
    assert (folder / "mine.txt").read_text() == "mine"


def test_without_the_library_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rocrate.rocrate", None)
    with pytest.raises(UserError, match="pip install 'rocrate"):
        write_bundle(make_run(tmp_path))


def test_a_run_without_figures_has_no_bundle(tmp_path):
    pytest.importorskip("rocrate")
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    with pytest.raises(UserError, match="no figures yet"):
        write_bundle(run)


def test_the_command_writes_both_for_one_run(tmp_path):
    pytest.importorskip("rocrate")
    run = make_run(tmp_path)
    told = CliRunner().invoke(app, ["report", str(run.path), "--bundle", "--tripod-llm"])
    assert told.exit_code == 0
    assert f"bundle: {run.path / 'bundle'}" in told.output
    assert (run.path / "tripod-llm.md").read_text(encoding="utf-8").startswith("# TRIPOD-LLM")
    both = ["report", str(run.path), "--bundle", "--tripod-llm", "--out", str(tmp_path / "x")]
    told = CliRunner().invoke(app, both)
    assert "--out names one place" in str(told.exception)
    assert not (tmp_path / "x").exists()
    target = tmp_path / "paper" / "checklist.md"
    for out, file in ((target, target), (target.parent, target.parent / "tripod-llm.md")):
        told = CliRunner().invoke(app, ["report", str(run.path), "--tripod-llm", "--out", str(out)])
        assert told.output == f"checklist: {file}\n"
        assert file.read_text(encoding="utf-8").startswith("# TRIPOD-LLM")
    two = CliRunner().invoke(app, ["report", str(run.path), str(run.path), "--bundle"])
    assert isinstance(two.exception, UserError)
    assert "of one run" in str(two.exception)


def test_the_citation_names_the_project():
    text = (Path(__file__).parents[3] / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert text.startswith("cff-version: 1.2.0\n")
    assert f"version: {project['version']}\n" in text
    assert f"license: {project['license']}\n" in text
    assert "  - name: FedRx developers\n" in text
