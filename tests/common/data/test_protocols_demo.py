"""What each protocol must give of the MIMIC-IV demo: by the product's way, and by pandas alone.

The second way shares no line with the first: it reads the files, and knows the rules from the
documentation.
"""

import pandas as pd
import pytest
from meds_fixtures import write_meds

from common.config import DataConfig, PartitionConfig
from common.data.partition import assign_hospitals
from common.data.prepare import load_samples

DAY = pd.Timedelta(hours=24)


def read(folder, name):
    return pd.read_csv(folder / "hosp" / f"{name}.csv.gz", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def tables(mimic_demo):
    stays = read(mimic_demo, "admissions")
    stays["came"], stays["went"] = map(pd.to_datetime, (stays.admittime, stays.dischtime))
    orders = read(mimic_demo, "prescriptions").query("drug_type == 'MAIN'")
    name = orders.drug.str.casefold().str.split().str.join(" ")
    flush = name.str.contains("flush") & name.str.contains("saline|sodium chloride|heparin")
    orders = orders.assign(name=name, start=pd.to_datetime(orders.starttime))[~flush]
    orders = orders.merge(stays[["hadm_id", "came"]], on="hadm_id")
    return stays, orders


@pytest.fixture(scope="module")
def samples(mimic_demo, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {
        protocol: load_samples(DataConfig(path=str(mimic_demo), protocol=protocol), cache_dir=cache)
        for protocol in ("admission", "visits", "first-24h")
    }


def numbers(table):
    return table.counts.as_json()["protocol"]["counted"]


def test_the_source_is_still_the_demo_and_nothing_is_absent(samples):
    for protocol in ("visits", "first-24h"):
        assert samples[protocol].source == "demo"
        assert samples[protocol].counts.protocol.absent == ()


def test_every_row_is_in_use_or_has_a_reason(samples):
    for table in samples.values():
        counts = table.counts.as_json()
        for name, rows in counts["rows"].items():
            reasons = sum(n for key, n in counts["dropped"].items() if key.startswith(f"{name}."))
            assert rows == counts["rows_out"][name] + reasons, name


def test_the_usual_protocol_has_no_key_of_its_own(samples):
    assert "protocol" not in samples["admission"].counts.as_json()


def test_visits_by_both_ways(mimic_demo, tables, samples):
    stays, orders = tables
    coded, done = read(mimic_demo, "diagnoses_icd"), read(mimic_demo, "procedures_icd")
    whole = stays[stays.hadm_id.isin(coded.hadm_id) & stays.hadm_id.isin(orders.hadm_id)]
    visits = whole.groupby("subject_id").hadm_id.transform("size")
    several = whole[visits >= 2]
    by_pandas = {
        "patients": several.subject_id.nunique(),
        "visits": len(several),
        "after_the_first": len(several) - several.subject_id.nunique(),
        "most_visits": several.groupby("subject_id").size().max(),
        "with_procedures": several.hadm_id.isin(done.hadm_id).sum(),
        "admissions_with_procedures": stays.hadm_id.isin(done.hadm_id).sum(),
    }
    assert (
        numbers(samples["visits"])
        == by_pandas
        == {
            "patients": 46,
            "visits": 196,
            "after_the_first": 150,
            "most_visits": 17,
            "with_procedures": 139,
            "admissions_with_procedures": 187,
        }
    )
    assert [str(one.admission) for one in samples["visits"].admissions] == list(
        several.sort_values(
            ["subject_id", "came"], key=lambda c: pd.to_numeric(c) if c.name == "subject_id" else c
        ).hadm_id
    )


def test_each_visit_shows_the_samples_before_it(mimic_demo, samples):
    done = read(mimic_demo, "procedures_icd").groupby("hadm_id").size()
    by_patient = {}
    for one in samples["visits"].admissions:
        past = by_patient.setdefault(one.patient, [])
        assert [visit.drugs for visit in one.earlier] == [before.drugs for before in past]
        assert [visit.diagnoses for visit in one.earlier] == [before.diagnoses for before in past]
        assert [visit.procedures for visit in one.earlier] == [before.procedures for before in past]
        # A code that stands twice is one procedure.
        assert 0 <= len(one.procedures) <= done.get(str(one.admission), 0)
        past.append(one)
    whole = {one.admission: one for one in samples["admission"].admissions}
    for one in samples["visits"].admissions:
        assert (one.drugs, one.diagnoses) == (
            whole[one.admission].drugs,
            whole[one.admission].diagnoses,
        )


def test_first_24h_orders_by_both_ways(tables, samples):
    _, orders = tables
    early = orders.start < orders.came + DAY
    first = orders.groupby(["hadm_id", "name"]).agg(start=("start", "min"), came=("came", "first"))
    later = first[first.start >= first.came + DAY].reset_index()
    by_pandas = {
        "order_rows": len(orders),
        "order_rows_early": early.sum(),
        "order_rows_before_admission": (orders.start < orders.came).sum(),
        "order_rows_later": (orders.start >= orders.came + DAY).sum(),
        "pairs_later": len(later),
        "pairs_early": len(first) - len(later),
        "admissions_later": later.hadm_id.nunique(),
    }
    found = numbers(samples["first-24h"])
    assert {key: found[key] for key in by_pandas} == by_pandas
    assert list(by_pandas.values()) == [13_652, 5_614, 184, 8_038, 2_724, 4_210, 224]
    admissions = samples["first-24h"].admissions
    assert sum(len(one.drugs) for one in admissions) == 2_724
    names = later.groupby("hadm_id").name.agg(set)
    for one in admissions:
        assert {" ".join(drug.casefold().split()) for drug in one.drugs} == names[
            str(one.admission)
        ]


def test_first_24h_results_by_both_ways(mimic_demo, tables, samples):
    stays, _ = tables
    labs = read(mimic_demo, "labevents")
    placed = labs[labs.hadm_id != ""].merge(stays[["hadm_id", "came"]], on="hadm_id")
    drawn, stored = pd.to_datetime(placed.charttime), pd.to_datetime(placed.storetime)
    until = placed.came + DAY
    by_pandas = {
        "lab_rows": len(labs),
        "lab_rows_of_admissions": len(placed),
        "lab_rows_before_admission": (drawn < placed.came).sum(),
        "lab_rows_early": ((drawn >= placed.came) & (drawn < until)).sum(),
    }
    found = numbers(samples["first-24h"])
    assert {key: found[key] for key in by_pandas} == by_pandas
    assert list(by_pandas.values()) == [107_727, 79_307, 1_969, 15_773]
    known = placed[(drawn < until) & ~(stored >= until) & (placed.valuenum != "")]
    names = read(mimic_demo, "d_labitems").set_index("itemid")
    label = known.itemid.map(names.label)
    fluid = known.itemid.map(names.fluid)
    known = known.assign(
        name=label.where(fluid == "Blood", label + " (" + fluid + ")"),
        value=known.valuenum.astype(float),
        drawn=drawn,
    )
    last = known.sort_values(["drawn", "value"]).groupby(["hadm_id", "name"]).last().reset_index()
    for one in samples["first-24h"].admissions:
        own = last[last.hadm_id == str(one.admission)]
        assert len(one.labs) == min(24, len(own))
        flagged = own[own.flag == "abnormal"]
        assert sum(text.endswith(", abnormal") for text in one.labs) == min(24, len(flagged))
        values = own.set_index("name").value
        for text in one.labs:
            name, _, result = text.rpartition(": ")
            assert float(result.split(",")[0].split()[0]) == values[name]


def test_first_24h_earlier_stays_by_both_ways(mimic_demo, tables, samples):
    stays, _ = tables
    coded = read(mimic_demo, "diagnoses_icd")
    coded["code"] = coded.icd_version + ":" + coded.icd_code
    codes = coded.assign(seq=coded.seq_num.astype(int)).sort_values("seq")
    codes = codes.groupby("hadm_id").code.agg(tuple)
    for one in samples["first-24h"].admissions:
        own = stays[stays.hadm_id == str(one.admission)].iloc[0]
        past = stays[(stays.subject_id == own.subject_id) & (stays.went <= own.came)]
        assert [visit.diagnosis_codes for visit in one.earlier] == [
            codes[hadm] for hadm in past.sort_values("came").hadm_id
        ]
        assert one.diagnoses == one.diagnosis_codes == ()
        assert not any(visit.drugs or visit.procedures for visit in one.earlier)


def test_visits_are_split_as_in_the_literature(samples):
    table = samples["visits"]
    data = DataConfig(protocol="visits")
    shares = []
    for seed in range(20):
        (one,) = assign_hospitals(
            table.admissions,
            PartitionConfig(),
            hospitals=1,
            data=DataConfig(protocol="visits", split_seed=seed),
        )
        patients = [{a.patient for a in split} for split in (one.train, one.validation, one.test)]
        assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]
        shares.append([len(own) / 46 for own in patients])
    means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
    assert means == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.04)
    assert data.validation_fraction == DataConfig().validation_fraction


def test_the_demo_as_meds_gives_the_same_but_what_it_has_lost(mimic_demo, samples, tmp_path):
    folder = write_meds(mimic_demo, tmp_path / "meds")
    for protocol, lost in (("visits", "procedures"), ("first-24h", "labs")):
        data = DataConfig(path=str(folder), protocol=protocol)
        found = load_samples(data, cache_dir=tmp_path / "cache")
        assert found.counts.protocol.absent
        events = {one.admission: one for one in found.admissions}
        assert len(events) == len(samples[protocol].admissions)
        for one in samples[protocol].admissions:
            other = events[one.admission]
            assert not getattr(other, lost)
            assert (other.drugs, other.ordered, other.diagnoses) == (
                one.drugs,
                one.ordered,
                one.diagnoses,
            )
            assert [(visit.diagnosis_codes, visit.drugs) for visit in other.earlier] == [
                (visit.diagnosis_codes, visit.drugs) for visit in one.earlier
            ]
