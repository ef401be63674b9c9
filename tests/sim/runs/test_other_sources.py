"""Every verb that reads data works from MEDS and from eICU's tables as from MIMIC-IV's."""

from pathlib import Path
from typing import Any

import pytest
from eicu_fixtures import many_patients, write_eicu
from eicu_meds_fixtures import eicu_events, write_eicu_meds
from meds_fixtures import write_meds

from common.config import Config
from common.configio import from_flat
from common.data.synthetic.write import write_tables
from common.rundir import RunDirectory
from sim.assist.patient_form import read_form
from sim.assist.suggest import Assistant, assistant_config, reference_of
from sim.report.data_description import describe
from sim.runs.federate import federate
from sim.runs.single import single

KEYS: dict[str, Any] = {
    "model.backbone": "tiny",
    "adapter.rank": 2,
    "train.batch-size": 2,
    "train.max-length": 192,
    "train.dtype": "fp32",
    "train.device": "cpu",
    "train.threads": 1,
    "federation.hospitals": 2,
    "federation.rounds": 1,
    "federation.local-steps": 1,
    "evaluation.samples": 2,
    "evaluation.validation-samples": 1,
    "evaluation.max-new-tokens": 8,
    "evaluation.bootstrap": 100,
    "run.backend": "in-process",
}


@pytest.fixture(scope="module", params=["meds", "eicu", "eicu-meds"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param.startswith("eicu"):
        if request.param == "eicu":
            write_eicu(folder / "data", many_patients(8))
        else:
            write_eicu_meds(folder / "data", eicu_events(many_patients(8)))
        return from_flat({**KEYS, "data.path": str(folder / "data"), "partition.scheme": "site"})
    write_tables(folder / "tables", patients=40, seed=0)
    write_meds(folder / "tables", folder / "data")
    return from_flat({**KEYS, "data.path": str(folder / "data")})


@pytest.mark.slow
def test_describe_federate_single_and_suggest(config: Config, tmp_path: Path) -> None:
    found = describe(config)
    assert found.as_json()["source"] == "credentialed"
    sizes = [one["patients"] for one in found.as_json()["partition"]["hospitals"]]
    assert len(sizes) == 2
    assert min(sizes) > 5
    together = federate(config, command_line=(), run_dir=tmp_path / "federated").result
    alone = single(config, command_line=(), run_dir=tmp_path / "single").result
    for summary in (together, alone):
        assert summary.source == "credentialed"
        assert summary.metrics["fedrx"].samples == 2
    run = RunDirectory.open(tmp_path / "federated")
    own = assistant_config(run)
    reference = reference_of(own)
    assert reference.support is not None
    assert "credentialed tables" in reference.index.origin
    asked = reference.index.search("sepsis")[0]
    form = {"sex": "F", "age": "70", "height": "", "weight": "", "diagnoses": [asked.title]}
    answer = Assistant(run, own, reference=reference).suggest(read_form(form, reference.index))
    assert answer.similar > 0
    report = (run.path / "report.md").read_text(encoding="utf-8")
    assert "Credentialed data" in report
    assert "sepsis" not in report.casefold(), "rows of credentialed data stay out of a report"
