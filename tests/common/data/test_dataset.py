"""The data of a run, opened in one place."""

import re
from dataclasses import fields, replace
from pathlib import Path

from common.config import Config, DataConfig, FederationConfig
from common.data.dataset import open_hospitals, what_decides
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples

ROOT = Path(__file__).parents[3]


def test_samples_hospitals_source_and_digest_are_those_of_the_parts(tmp_path):
    config = Config(
        data=DataConfig(synthetic_patients=30), federation=FederationConfig(hospitals=2)
    )
    opened = open_hospitals(config, cache_dir=tmp_path)
    table = load_samples(config.data, cache_dir=tmp_path)
    dealt = assign_hospitals(table.admissions, config.partition, hospitals=2, data=config.data)
    assert opened.samples == table
    assert opened.hospitals == dealt
    assert (opened.source, opened.digest) == ("synthetic", table.digest)
    assert opened.train == [*dealt[0].train, *dealt[1].train]


def test_settings_that_decide_nothing_open_to_the_same(tmp_path):
    """All other settings of the data stand in what decides: whoever keeps data goes by it."""
    undecided = {"normalisation": "ingredient", "drug_map": "absent.csv", "drug_order": "set"}
    config = Config(data=DataConfig(synthetic_patients=30))
    other = replace(config, data=DataConfig(synthetic_patients=30, **undecided))
    assert open_hospitals(other, cache_dir=tmp_path) == open_hospitals(config, cache_dir=tmp_path)
    assert what_decides(other) == what_decides(config)
    for field in fields(DataConfig):
        if field.name not in undecided:
            data = replace(config.data)
            object.__setattr__(data, field.name, "another")
            assert what_decides(replace(config, data=data)) != what_decides(config), field.name


def test_nobody_else_reads_and_deals():
    """One place reads samples for hospitals: a second could read other ones."""
    callers = {
        path.relative_to(ROOT).as_posix()
        for package in ("common", "server", "client", "sim")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"(?<!def )\b(load_samples|assign_hospitals)\(", path.read_text())
    }
    # The second reads made-up admissions, which no hospital has, and deals nothing.
    assert callers == {"common/data/dataset.py", "sim/answers/public_curve.py"}
