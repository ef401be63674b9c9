"""The checklist: every item once, filled only with what the run says."""

import re
from dataclasses import replace

from common.config import Config, PrivacyConfig, TextConfig
from common.records.summary import Summary
from common.rundir import RunDirectory
from sim.report.tripod import checklist, write_checklist

PEOPLE = ("1", "2", "3a", "3b", "13", "14a", "14b", "14c", "14d", "15", "19a", "19g")
SUMMARY = {
    "source": "demo",
    "hospitals": [
        {"name": "hospital-1", "patients": 40, "samples": 60},
        {"name": "hospital-2", "patients": 30, "samples": 45},
    ],
    "backbone": {"name": "/data/private/llama|8b", "fingerprint": "f" * 64},
    "b_sha256": "b" * 64,
    "seconds": 90.0,
    "device": "cpu",
    "peak_rss_bytes": 2**31,
    "workers": 2,
    "metrics": {
        "fedrx": {"f1": 0.3481, "samples": 32},
        "popularity": {"f1": 0.4131, "samples": 32},
        "untrained": {"f1": None, "samples": 32},
    },
    "privacy": {"epsilon": 6.0, "delta": 1e-5, "unit": "patient"},
    "review": {
        "reviewers": ["Anna Secret", "Bert Secret"],
        "cases": 5,
        "agreement": {"alpha_drugs": 0.75},
        "judge": {"agree": 0.8, "drugs": 10},
    },
    "judge": {"model": "judge-1"},
}


ROW = re.compile(r"^\| (\d+[a-g]?) \| [^|]+ \| (.+) \|$", re.MULTILINE)
ITEMS = [item for item, _ in ROW.findall(checklist(Config(), Summary()))]


def rows(text):
    found = ROW.findall(text)
    assert [item for item, _ in found] == ITEMS
    assert len(text.splitlines()) == len(ITEMS) + 7
    return dict(found)


def test_items_are_the_guidelines_in_order():
    numbers = [int(re.match(r"\d+", item)[0]) for item in ITEMS]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 20))
    assert len(ITEMS) == len(set(ITEMS)) == 49
    letters = {
        n: "".join(i[len(str(n)) :] for i in ITEMS if re.fullmatch(rf"{n}[a-g]?", i))
        for n in numbers
    }
    assert {n: one for n, one in letters.items() if one} == {
        3: "ab",
        5: "abcde",
        6: "abcde",
        7: "abcde",
        8: "abc",
        9: "ab",
        14: "abcdef",
        16: "abcd",
        19: "abcdefg",
    }


def test_a_run_that_knows_nothing_leaves_results_to_the_author(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    run.write_json("summary.json", {})
    text = write_checklist(run).read_text(encoding="utf-8")
    found = rows(text)
    for item in (*PEOPLE, "6a", "7b", "7d", "7e", "8a", "8b", "12", "16d", "17", "18"):
        assert found[item] == "author"
    assert "no differential privacy" in found["6b"]


def test_what_the_run_knows_is_filled_in(tmp_path):
    config = replace(Config(), privacy=PrivacyConfig(target_epsilon=6.0))
    run = RunDirectory.create(config, directory=tmp_path / "run")
    run.write_json("summary.json", SUMMARY)
    text = write_checklist(run).read_text(encoding="utf-8")
    found = rows(text)
    assert all(found[item] == "author" for item in PEOPLE)
    assert found["17"].startswith("F1 0.348 on 32 held-out admissions")
    assert found["7e"] == "popularity (F1 0.413)"
    assert found["16d"] == "2 hospital(s), 70 patients, 105 admissions"
    assert found["12"] == "90 s on cpu, peak memory 2.00 GiB, 2 worker(s)"
    assert "epsilon 6.000, delta 1e-05 per patient" in found["6b"]
    assert "2 reviewer(s) of 5 cases, Krippendorff's alpha 0.750" in found["8b"]
    assert "agrees with the reviewers on 80% of 10 drugs" in found["7b"]
    assert "sha256 ffffffffffff; B sha256 bbbbbbbbbbbb" in found["6a"]
    for secret in ("Secret", "/data/private", str(tmp_path)):
        assert secret not in text


def test_a_private_runs_sizes_stay_untold():
    hidden = [{"name": "hospital-1"}, {"name": "hospital-2"}]
    known = rows(checklist(Config(), Summary.model_validate({**SUMMARY, "hospitals": hidden})))
    assert known["16d"] == "author"


def test_how_lists_came_about_is_that_of_the_figures():
    """An evaluation may score where the run's configuration generates."""
    generated = rows(checklist(Config(), Summary.model_validate(SUMMARY)))
    assert generated["6e"] == "author"
    assert "text, one drug a line" in generated["6d"]
    settings = {"settings": {"method": "score", "decoding": "greedy", "max_new_tokens": 64}}
    scored = rows(checklist(Config(), Summary.model_validate({**SUMMARY, "evaluation": settings})))
    assert "method score" in scored["6c"]
    assert "tokens" not in scored["6c"]
    assert scored["6d"].startswith("a ranking of the formulary's drugs")
    assert "threshold" in scored["6e"]


def test_prompts_of_the_users_own_are_for_the_authors_to_explain():
    summary = Summary.model_validate(SUMMARY)
    assert rows(checklist(Config(), summary))["9a"] == "one fixed prompt, not tuned"
    own = Config(text=TextConfig(system_prompt="Say | it.\nNow.", template="x\n{diagnoses}"))
    known = rows(checklist(own, summary))
    assert known["9a"] == "author"
    assert 'system message "Say \\| it. Now."' in known["6c"]
    assert 'template "x {diagnoses}"' in known["6c"]


def test_reproducible_noise_is_no_guarantee(tmp_path):
    config = replace(Config(), privacy=PrivacyConfig(target_epsilon=6.0))
    run = RunDirectory.create(config, directory=tmp_path / "run")
    privacy = {"epsilon": "infinity", "delta": 1e-5, "unit": "patient"}
    run.write_json("summary.json", {**SUMMARY, "privacy": privacy})
    text = write_checklist(run).read_text(encoding="utf-8")
    assert "noise without a guarantee" in rows(text)["6b"]
