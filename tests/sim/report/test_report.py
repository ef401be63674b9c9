"""The report: complete, offline, and silent about patients where the source asks for it."""

import html
import io
import re
import shutil

import pytest
from line_fixtures import prediction_line, privacy_line, wire_line

from common.config import Config
from common.configio import from_flat
from common.errors import UserError
from common.records.run import Metric
from common.rundir import RunDirectory
from sim.cli.terminal import Terminal
from sim.report.comparison import write_comparison
from sim.report.plots import loss_svg
from sim.report.run_report import write_report
from sim.report.terminal import summary_parts
from sim.report.words import RANDOM_WEIGHTS


def values(f1):
    return {
        "level": "string",
        "samples": 4,
        "patients": 3,
        "output_rate": 1.0,
        "precision": 0.5,
        "recall": 0.25,
        "jaccard": 0.2,
        "f1": f1,
        "length_ratio": None,
        "oov_rate": 0.0,
        "intervals": {"f1": [f1 - 0.1, f1 + 0.1]},
    }


SCALING = {
    "train_samples": 8,
    "steps": 16,
    "steps_per_epoch": 2,
    "epochs": 8.0,
    "checkpoint_steps": [16],
    "notes": [],
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    summary = {
        "trainable_parameters": 3072,
        "adapter": {"mode": "fa-lora", "rank": 16, "alpha": 16.0, "targets": ["q_proj", "v_proj"]},
        "backbone": {"name": "tiny"},
        "hospitals": [{"name": "hospital-1", "patients": 3, "samples": 4}],
        "rounds": 1,
        "b_sha256": "ab" * 32,
        "wire": {"tensors": ["layer.lora_B"], "bytes_up": 1_000_000, "bytes_down": 2_000_000},
        "backbone_loads": 1,
        "workers": 1,
        "validation_loss": [3.0, 2.0],
        "metrics": {"fedrx": values(0.321), "popularity": values(0.456)},
        "seconds": 12.0,
        "peak_rss_bytes": 2**30,
        "device": "cpu",
        "attention": {"kernel": "sdpa", "reason": "no GPU <here>"},
        "dtype": {"value": "fp32", "reason": "asked for"},
        "source": "demo",
    }
    run.write_json("summary.json", summary)
    for number, loss in enumerate((3.0, 2.0)):
        run.metric("validation-loss", loss, round=number)
        run.metric("validation-loss", loss + 0.1, round=number, hospital="hospital-1")
    run.append("wire.jsonl", wire_line(bytes=1_000_000))
    for model in ("fedrx", "untrained"):
        told = {"diagnoses": ["Secret, diagnosis"], "truth": ["Drug | one"]}
        run.append("predictions.jsonl", prediction_line("case-0001", model, None, **told))
    return run


def with_source(run, source):
    run.write_json("summary.json", {**run.read_json("summary.json"), "source": source})


@pytest.mark.slow
def test_page_and_markdown_carry_the_same_figures(run):
    page = html.unescape(write_report(run).read_text())
    twin = (run.path / "report.md").read_text()
    for text in (page, twin):
        for figure in ("0.321 (0.22–0.42)", "0.456 (0.36–0.56)", "3,072", "ab" * 32, "1.00 MB"):
            assert figure in text
        assert "Research only, not for clinical use." in text
        assert "MIMIC-IV demo" in text
        assert "not in the format" in text
    assert page.count("<svg") == 2


def test_the_page_refers_to_nothing_outside_itself(run):
    page = write_report(run).read_text()
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page.replace("xlink:", ""))
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "no GPU &lt;here&gt;" in page


@pytest.mark.parametrize(("source", "shown"), [("synthetic", 1), ("demo", 1), ("credentialed", 0)])
def test_answers_are_shown_only_where_the_source_allows_it(run, source, shown):
    with_source(run, source)
    page = write_report(run).read_text()
    twin = (run.path / "report.md").read_text()
    assert ("Secret, diagnosis" in page) == ("Secret, diagnosis" in twin) == bool(shown)


def test_an_unknown_source_counts_as_credentialed(run):
    summary = run.read_json("summary.json")
    del summary["source"]
    run.write_json("summary.json", summary)
    assert "Secret, diagnosis" not in write_report(run).read_text()


def test_an_unfinished_run_has_no_report(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "empty")
    with pytest.raises(UserError, match="has not finished"):
        write_report(run)
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize(("mode", "sent"), [("fa-lora", "B only"), ("lora", "A and B only")])
def test_what_was_sent_is_named(run, mode, sent):
    summary = run.read_json("summary.json")
    run.write_json("summary.json", {**summary, "adapter": {**summary["adapter"], "mode": mode}})
    assert f"1 tensors, {sent};" in write_report(run).read_text()


@pytest.mark.parametrize("name", ["tiny", "embedded"])
def test_answers_of_random_weights_are_called_that(run, name):
    run.write_json("summary.json", {**run.read_json("summary.json"), "backbone": {"name": name}})
    told = io.StringIO()
    Terminal(file=told, width=200).say(*summary_parts(run, run.summary()))
    for text in (told.getvalue(), write_report(run).read_text()):
        assert (RANDOM_WEIGHTS in html.unescape(text)) == (name == "tiny")


@pytest.mark.parametrize(
    ("model", "facts", "label"),
    [
        ("round-00001", {"rounds": 4}, "FedRx, round 1 of 4"),
        ("step-00000004", {"scaling": SCALING}, "FedRx, step 4 of 16"),
    ],
)
def test_an_earlier_checkpoints_answers_are_called_that(run, model, facts, label):
    summary = {**run.read_json("summary.json"), **facts}
    summary["metrics"][model] = values(0.111)
    run.write_json("summary.json", summary)
    told = io.StringIO()
    Terminal(file=told, width=200).say(*summary_parts(run, run.summary()))
    page = write_report(run).read_text()
    for text in (told.getvalue(), page, (run.path / "report.md").read_text()):
        assert re.search(label + r"\W.*0\.111", text)
        assert re.search(r"FedRx \(trained B\)\W.*0\.321", text)


@pytest.mark.parametrize(("multiplier", "words"), [(0.001, "stands above"), (50.0, "drowns")])
def test_a_private_run_ends_with_its_guarantee_and_its_verdict(run, multiplier, words):
    run.write_config(from_flat({"privacy.noise-multiplier": multiplier}))
    privacy = {
        "unit": "patient",
        "epsilon": 5.9989,
        "delta": 1e-4,
        "noise_multiplier": multiplier,
    }
    told = io.StringIO()
    Terminal(file=told, width=200).say(*summary_parts(run, run.summary().having(privacy=privacy)))
    guarantee = f"each patient: epsilon 5.999 at delta 0.0001; noise multiplier {multiplier:g}"
    assert guarantee in told.getvalue()
    assert re.search(f"noise over signal, per step: .*{words}", told.getvalue())


def test_a_comparison_replaces_only_its_own_page(run, tmp_path):
    other = RunDirectory(shutil.copytree(run.path, tmp_path / "other"))
    page = write_comparison([run, other], tmp_path / "both")
    before = page.read_text()
    with pytest.raises(UserError, match="holds something else"):
        write_comparison([other, run, run], tmp_path / "both")
    assert page.read_text() == before
    page.write_text("")
    write_comparison([run, other], tmp_path / "both")
    assert page.read_text() == before
    with pytest.raises(UserError, match="name another --out"):
        write_comparison([run, other], run.path)


def test_no_hospital_s_size_stands_in_a_private_report(run):
    hospitals = [{"name": "hospital-1", "train": 77, "validation": 78, "test": 79}]
    run.write_json("data.json", {"hospitals": hospitals})
    write_report(run)
    twin, said = (run.path / "report.md").read_text(), "no counts and no losses leave a hospital"
    assert "| hospital-1 | 3 | 4 | 77 | 78 | 79 |" in twin
    assert said not in twin
    privacy = {
        **dict.fromkeys(("unit", "relation", "accountant", "noise"), "x"),
        "epsilon": 2.0,
        "delta": 1e-5,
    }
    silent = {"name": "hospital-1", "patients": None, "samples": None}
    summary = {**run.read_json("summary.json"), "privacy": privacy, "hospitals": [silent]}
    run.write_json("summary.json", summary)
    run.append("privacy.jsonl", privacy_line(1, "hospital-1", 2.0))
    write_report(run)
    twin = (run.path / "report.md").read_text()
    assert "| hospital-1 | – | – | – | – | – |" in twin
    assert twin.count(said) == 1
    assert "| epsilon after round | hospital-1 |" in twin
    assert "training patients without privacy" in twin


def test_a_nearly_constant_loss_is_plotted_without_an_offset():
    events = [Metric(name="loss", value=7.239 + n * 1e-6, round=n, time=0) for n in range(3)]
    assert "+7.239" not in loss_svg(events)
    assert "7.239" in loss_svg(events)


def test_rounds_that_lack_something_are_named(run):
    assert "not evaluated" not in write_report(run).read_text()
    run.metric("not-evaluated", "1 of 3 hospitals is connected", round=2)
    run.metric("withstands-nothing", 2, round=1)
    page = html.unescape(write_report(run).read_text())
    assert "Round 2 was not evaluated: 1 of 3 hospitals is connected." in page
    assert "Round 1: the strategy withstands nothing with 2 updates." in page


def test_the_result_comes_first_and_names_what_lies_above_and_below(run):
    summary = run.read_json("summary.json")
    summary["metrics"]["untrained"] = values(0.11)
    summary["metrics"]["nearest_neighbours"] = values(0.6)
    run.write_json("summary.json", summary)
    page = html.unescape(write_report(run).read_text())
    sentence = (
        "F1 of the trained B on 4 held-out admissions: 0.321 (95% interval 0.22 to 0.42); above "
        "untrained backbone 0.110; below nearest neighbours 0.600; not clearly apart from "
        "popularity 0.456."
    )
    assert page.index(sentence) < page.index("<h2>")
    # One bar for each, the best first, ours marked; its whisker is the interval.
    bars = re.findall(
        r'class="bar( ours)?"><span>([^<]*)<.*?width:([0-9.]+)%.*?left:([0-9.]+)%', page, re.S
    )
    assert bars == [
        ("", "nearest neighbours", "60.00", "50.00"),
        ("", "popularity", "45.60", "35.60"),
        (" ours", "FedRx (trained B)", "32.10", "22.10"),
        ("", "untrained backbone", "11.00", "1.00"),
    ]
    assert sentence in (run.path / "report.md").read_text()


def test_what_ran_says_all_that_decides_it(run):
    config = from_flat(
        {
            "partition.scheme": "dirichlet", "partition.alpha": 0.7, "partition.seed": 3,
            "train.batch-size": 6, "train.schedule": "cosine", "train.warmup-steps": 2,
            "federation.local-steps": 7, "federation.strategy": "krum",
            "data.path": "/secret/place",
        }
    )  # fmt: skip
    run.write_config(config)
    write_report(run)
    twin = (run.path / "report.md").read_text()
    for fact in (
        *("dirichlet, alpha 0.7", "7 in each hospital and round", "6 samples", "krum"),
        *("cosine, warm-up 2 steps", "hospitals 3", "| train.batch-size | 6 | 4 |"),
    ):
        assert fact in twin
    assert "/secret/place" not in twin


def test_privacy_s_figures_stand_together_and_equal_hospitals_in_one_column(run):
    run.write_config(from_flat({"privacy.noise-multiplier": 2.0}))
    privacy = {
        **dict.fromkeys(("unit", "relation", "accountant", "noise"), "x"),
        "epsilon": 2.0,
        "delta": 1e-5,
        "noise_multiplier": 2.0,
        "sampling_rate": 0.3,
        "clip_norm": 0.5,
        "expected_batch": 8.0,
        "per_hospital": [{"hospital": f"hospital-{n}", "epsilon": n} for n in (1, 2, 3)],
    }
    run.write_json("summary.json", {**run.read_json("summary.json"), "privacy": privacy})
    for number in (1, 2):
        for name, spent in (("hospital-1", 1.0), ("hospital-2", 1.0), ("hospital-3", 1.5)):
            run.append("privacy.jsonl", privacy_line(number, name, spent * number))
    write_report(run)
    twin = (run.path / "report.md").read_text()
    # sigma sqrt(P) / D
    ratio = 2.0 * 3072**0.5 / 8
    for fact in ("| noise multiplier | 2 |", "| sampling rate q | 0.3 |", "| clip norm | 0.5 |",
                 f"| noise over signal, per step | {ratio:.3g}: "):  # fmt: skip
        assert fact in twin
    assert "| epsilon after round | hospital-1 and hospital-2, equal | hospital-3 |" in twin
    assert "| 2 | 2.000 | 3.000 |" in twin
    assert re.search(r"\| hospital-1 .*\| 1.000 \|", twin)


def test_a_baseline_of_each_hospital_is_called_that(run):
    write_report(run)
    words = "fitted in each hospital, on its own training patients"
    assert words not in (run.path / "report.md").read_text()
    summary = run.read_json("summary.json")
    run.write_json("summary.json", {**summary, "hospitals": summary["hospitals"] * 2})
    write_report(run)
    assert words in (run.path / "report.md").read_text()
