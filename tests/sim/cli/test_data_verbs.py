"""``fedrx data prepare`` and ``describe``: the keys scripts read, and the page people read."""

import html
import io
import json
import re
from dataclasses import replace

import pytest

from common.config import OWN_TEXT
from common.configio import from_flat
from common.data.prepare import load_samples
from common.errors import UserError
from common.records.run import HospitalSizes
from common.text.batches import encode
from sim.cli.terminal import Terminal
from sim.report.data_description import (
    count_blocks,
    describe,
    description_blocks,
    local_tokenizer,
    prepare,
)
from sim.report.data_page import write_page
from sim.report.terminal import block_parts

KEYS = {
    "rows", "drug_type", "pairs_raw", "pairs_normalised", "pairs_clean", "flush_rows", "samples",
    "patients", "drugs_per_sample", "diagnosis_rows_joined", "diagnosis_rows_unmatched",
    "age_differs_from_anchor", "age_over_89", "height", "weight", "height_and_weight",
    "no_height_no_weight", "outliers", "dropped", "source", "partition",
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def config(**changed):
    values = {"data.path": "synthetic", "data.synthetic-patients": 60, "model.backbone": "tiny"}
    return from_flat({**values, **{k.replace("__", "."): v for k, v in changed.items()}})


@pytest.fixture(scope="module")
def description(cache):
    return describe(config(), cache_dir=cache)


def test_json_has_the_keys_of_the_contract(description):
    data = json.loads(json.dumps(description.as_json(), allow_nan=False))
    assert set(data) >= KEYS
    assert set(data["drug_type"]) >= {"MAIN", "BASE", "ADDITIVE"}
    assert set(data["drugs_per_sample"]) == {"mean", "min", "max"}
    assert set(data["outliers"]) == {"height", "weight", "bmi"}
    assert {"scheme", "hospitals", "skew", "null_skew"} <= set(data["partition"])
    assert all({"name", "patients", "samples"} <= set(h) for h in data["partition"]["hospitals"])
    assert data["source"] == "synthetic"


def test_hospital_sizes_add_up(description):
    sizes = description.as_json()["partition"]["hospitals"]
    assert len(sizes) == 3
    assert sum(one["samples"] for one in sizes) == description.as_json()["samples"]
    assert sum(one["patients"] for one in sizes) == description.as_json()["patients"]
    for one in sizes:
        assert one["samples"] == one["train"] + one["validation"] + one["test"]


def test_drops_by_a_missing_value_policy_are_counted(cache):
    found = describe(config(**{"data.missing-height": "drop"}), cache_dir=cache).as_json()
    dealt = sum(one["samples"] for one in found["partition"]["hospitals"])
    assert found["dropped"]["samples.missing_height_cm"] == found["samples"] - found["height"]
    assert dealt == found["height"]


def test_token_lengths_are_those_of_the_encoded_samples(description, cache):
    tokenizer, _ = local_tokenizer("tiny", cache)
    samples = [one for hospital in description.hospitals for one in hospital.admissions]
    lengths = sorted(
        len(encode(one, tokenizer, text=OWN_TEXT, max_length_tokens=10**6).input_ids)
        for one in samples
    )
    tokens = description.as_json()["tokens"]
    assert tokens["samples"] == len(samples)
    assert (tokens["total"]["min"], tokens["total"]["max"]) == (lengths[0], lengths[-1])
    assert tokens["total"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    limit = lengths[len(lengths) // 2]
    cut = describe(config(**{"train.max-length": limit}), cache_dir=cache).as_json()["tokens"]
    assert cut["longer_than_max_length"] >= sum(length > limit for length in lengths) > 0
    assert cut["dropped_drugs"] + cut["dropped_diagnoses"] >= cut["longer_than_max_length"]


def test_lengths_say_why_they_are_missing(cache):
    found = describe(config(**{"model.backbone": "nobody/no-llama"}), cache_dir=cache)
    assert found.lengths is None
    assert "not on this machine" in found.as_json()["tokens"]["reason"]
    tokenizer, reason = local_tokenizer("embedded", cache)
    assert tokenizer is None
    assert "not in the cache" in reason


def test_an_empty_hospital_stops_describe(cache):
    with pytest.raises(UserError, match=r"federation\.hospitals=60"):
        describe(config(**{"federation.hospitals": 60}), cache_dir=cache)


def test_what_people_read(description):
    stream = io.StringIO()
    Terminal(file=stream, width=120).say(*block_parts(*description_blocks(description)))
    text = stream.getvalue()
    assert "source: synthetic" in text
    assert "hospital-3" in text
    assert "partition by iid" in text
    assert f"{description.as_json()['pairs_clean']:,}" in text


def test_prepare_returns_counts_and_shows_them(cache):
    counts = prepare(config(), cache_dir=cache)
    assert counts.samples > 50
    stream = io.StringIO()
    Terminal(file=stream, width=120).say(*block_parts(*count_blocks(counts)))
    assert "unknown admission" in stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("hospitals", [1, 14])
def test_page_and_plots(cache, tmp_path, hospitals):
    found = describe(
        config(**{"federation.hospitals": hospitals, "data.synthetic-patients": 160}),
        cache_dir=cache,
    )
    page = write_page(found, tmp_path / "page")
    names = {path.name for path in page.parent.iterdir()}
    assert names == {
        "index.html", "hospital-sizes.png", "top-drugs.png", "list-lengths.png",
        "token-lengths.png",
    }  # fmt: skip
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(PNG)
    text = page.read_text()
    assert text.count("<svg") == 4
    # The heat map is an image of the page's own, which its policy must let through.
    assert "data:image/png" in text
    assert "img-src data:" in text
    assert "not for clinical use" in text
    assert not re.search(r"(src|href)=[\"']?https?://", text)


@pytest.mark.slow
def test_nothing_shown_tells_who_was_there(description, tmp_path):
    text = write_page(description, tmp_path).read_text() + json.dumps(description.as_json())
    for hospital in description.hospitals:
        for one in hospital.admissions:
            assert not re.search(rf"\b({one.patient}|{one.admission})\b", text)


@pytest.mark.slow
def test_equal_input_gives_an_equal_page(description, tmp_path):
    pages = [write_page(description, tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_the_page_has_what_the_terminal_has(description, tmp_path):
    """Rows left out, coverage and the hospitals' sizes: the same blocks."""
    text = html.unescape(write_page(description, tmp_path).read_text())
    for block in description_blocks(description):
        for cell in (block.title, block.note, *block.headers, *sum(block.rows, ())):
            assert cell in text
    assert "left out because" in text


def test_hospitals_are_called_by_what_they_were_dealt_by(cache):
    found = describe(config(**{"partition.scheme": "careunit"}), cache_dir=cache)
    first = {}
    for one in load_samples(config().data, cache_dir=cache).admissions:
        first.setdefault(one.patient, one.careunit)
    for hospital, sizes in zip(
        found.hospitals, found.as_json()["partition"]["hospitals"], strict=True
    ):
        units = [first[patient] for patient in {one.patient for one in hospital.admissions}]
        assert sizes["groups"] == {unit: units.count(unit) for unit in units}
    shown = "\n".join(cell for b in description_blocks(found) for row in b.rows for cell in row)
    assert all(unit in shown for unit in first.values())


def test_hospitals_with_few_held_out_samples_are_named(description):
    """Nobody is named where all have enough."""
    sizes = tuple(HospitalSizes(name=f"h-{n}", validation=n, test=5) for n in (4, 5))
    few = replace(description, sizes=sizes)
    (note,) = [block.note for block in description_blocks(few) if block.warning]
    assert "h-4 (4 validation, 5 test)" in note
    assert "h-5" not in note
    enough = replace(few, sizes=sizes[1:])
    assert not [block for block in description_blocks(enough) if block.warning]
