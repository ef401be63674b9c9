"""A stranger's source: a class of its own and one entry of the list are all that it takes."""

import datetime

import polars as pl
import pytest

import common.data.sources
from common.config import Config, DataConfig, FederationConfig
from common.data.cleaning.assemble import Book, assemble, items
from common.data.cleaning.diagnoses import diagnosis_lists, match_titles
from common.data.cleaning.measures import clean_measures
from common.data.cleaning.orders import Orders, drug_lists, one_row_per_pair
from common.data.dataset import open_hospitals
from common.data.handling import handling_of
from common.data.icd import Diagnosis
from common.data.source import Source
from sim.assist.suggest import reference_of
from sim.report.data_description import describe

NOON = datetime.datetime(2020, 1, 1, 12)


class Ward(Source):
    """One line per patient: number, diagnosis, drug."""

    def claims(self, path):
        return path.endswith(".ward")

    def files(self, folder, config):
        return {folder.name: folder}

    def tag(self, folder, hashes):
        return "our own"

    def read(self, folder, config, *, progress):
        rows = pl.read_csv(folder, has_header=False, new_columns=["hadm_id", "title", "drug"])
        book = Book()
        known = rows["hadm_id"]
        coded = rows.select("hadm_id", seq_num=1, icd_code="title", icd_version=pl.lit("10"))
        titles = coded.select("icd_code", "icd_version", title="icd_code").unique()
        diagnoses = diagnosis_lists(coded, match_titles(coded, titles), known)
        lines = rows.select("hadm_id", pl.col("drug").cast(pl.Categorical), start=pl.lit(NOON))
        kinds = {"MAIN": rows.height}
        orders = Orders(pairs=one_row_per_pair(lines), drug_type=kinds, rows=rows.height)
        drugs = drug_lists(orders, known, drop_flushes=config.drop_flushes)
        book.rows["ward"] = rows.height
        book.drop("ward", drugs.dropped)
        book.out["ward"] = items(drugs.lists["drugs"])
        stays = rows.select(
            "hadm_id",
            subject_id="hadm_id",
            admittime=pl.lit(NOON),
            gender=pl.lit("F"),
            age=pl.lit(50, pl.Int64),
        )
        nothing = {
            "subject_id": pl.Int64,
            "date": pl.Date,
            "seq_num": pl.Int64,
            "kind": pl.String,
            "value": pl.Float64,
        }
        return assemble(
            stays,
            book,
            diagnoses=diagnoses,
            drugs=drugs,
            measures=clean_measures(pl.DataFrame(schema=nothing), known),
            folder=folder,
            null_spelled={},
        )

    def titles(self, folder, config):
        return [Diagnosis(title="Gout", code="10:M109")]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(common.data.sources, "SOURCES", (Ward(), *common.data.sources.SOURCES))
    monkeypatch.setenv("FEDRX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "north.ward"
    lines = [f'{n},I10,"{"Aspirin" if n % 3 else "heparin flush"}"' for n in range(60)]
    path.write_text("\n".join(lines))
    return Config(data=DataConfig(path=str(path)), federation=FederationConfig(hospitals=2))


def test_it_is_read_cleaned_counted_dealt_and_described(config):
    opened = open_hospitals(config)
    assert {one.drugs for one in opened.samples.admissions} == {("Aspirin",)}
    assert len(opened.samples.admissions) == 40
    counts = opened.samples.counts
    assert (counts.rows["ward"], counts.rows_out["ward"]) == (60, 40)
    assert counts.dropped["ward.flush"] == 20
    assert describe(config).as_json()["samples"] == 40
    assert reference_of(config).index.read("M109").title == "Gout"


def test_its_own_tag_counts_as_credentialed(config):
    opened = open_hospitals(config)
    assert opened.source == "our own"
    assert not handling_of(opened.source).is_open
