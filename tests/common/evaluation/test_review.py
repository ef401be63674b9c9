"""The packet's blindness and seeds, what an import refuses, and figures by hand."""

import hashlib
import json
from collections import Counter

import pytest
from line_fixtures import prediction_line

from common.config import Config, DataConfig
from common.errors import UserError
from common.evaluation.answers_file import Prediction, read_answers
from common.evaluation.judge.questions import Judgement
from common.evaluation.review.packet import ShownList, make_packet
from common.evaluation.review.packet_import import Review
from common.evaluation.review.scores import summarise_reviews
from common.rundir import RunDirectory
from sim.answers.review import import_reviews, make_review


def line(case, model, answer, truth=("T",)):
    patient = {"sex": "M", "age": "50", "height_cm": None, "weight_kg": None, "bmi": None}
    told = {"cluster": int(case.split("-")[1]), "patient": patient, "truth": list(truth)}
    return Prediction.model_validate(prediction_line(case, model, answer, **told))


LINES = [line(f"case-{n}", m, [f"{m}{n}", "Z", "b"]) for n in range(60) for m in ("x", "y", "z")]


def test_each_model_takes_each_place_about_equally_often():
    key = make_packet(LINES, source="demo").key
    first = Counter(case.lists["A"] for case in key.cases)
    assert set(first) == {"x", "y", "z"}
    # 60 fair draws among three: fewer than 8 for one of them has a chance below 1 in 1000.
    assert min(first.values()) >= 8


def test_the_seed_decides_and_nothing_else():
    assert make_packet(LINES, source="demo", seed=1) == make_packet(LINES, source="demo", seed=1)
    assert make_packet(LINES, source="demo", seed=1).key != make_packet(LINES, source="demo").key
    backwards = make_packet(LINES[::-1], source="demo", seed=1).key
    orders = {case.case: case.lists for case in backwards.cases}
    same = make_packet(LINES, source="demo", seed=1).key
    assert orders == {case.case: case.lists for case in same.cases}


def test_drugs_stand_in_alphabetical_order_once_each():
    shown = make_packet([line("case-1", "x", ["b", "Z", "a", "B "])], source="demo").shown
    assert shown.cases[0].lists == (ShownList(id="A", drugs=("a", "b", "Z")),)


def test_cases_are_chosen_by_seed():
    chosen = [
        [case.case for case in make_packet(LINES, source="demo", cases=5, seed=s).key.cases]
        for s in (0, 0, 1)
    ]
    assert len(chosen[0]) == 5
    assert chosen[0] == chosen[1] != chosen[2]
    with pytest.raises(UserError, match="--cases 61"):
        make_packet(LINES, source="demo", cases=61)


def test_unknown_models_and_missing_predictions_are_refused():
    with pytest.raises(UserError, match="nobody"):
        make_packet(LINES, source="demo", models=["nobody"])
    with pytest.raises(UserError, match="evaluate"):
        make_packet([], source="demo")


# From here on: two cases, two models, two reviewers, one judge.
TWO = [
    line("case-1", "x", ["A", "B"], ["A", "C"]),
    line("case-1", "y", ["A"], ["A", "C"]),
    line("case-2", "x", None, ["D"]),
    line("case-2", "y", ["D", "E"], ["D"]),
]


def review(packet, reviewer, marks, *, missing=(), overall=None):
    """``marks``: (case, model) -> marks in the shown (alphabetical) order."""
    cases = {}
    for shown, key in zip(packet.shown.cases, packet.key.cases, strict=True):
        lists = {}
        for one in shown.lists:
            given = marks.get((key.case, key.lists[one.id]), [None] * len(one.drugs))
            lists[one.id] = {"marks": given, "missing": list(missing), "overall": overall}
        cases[shown.id] = {"comment": "", "lists": lists}
    return {"packet": packet.sha256, "reviewer": reviewer, "saved": "now", "cases": cases}


def judged(case, model, **verdicts):
    listed = [{"drug": d, "suitable": s, "reason": ""} for d, s in verdicts.items()]
    whose = {"case": case, "model": model, "judge": "j", "repeat": 0, "server": "s"}
    return {**whose, "verdicts": listed or None}


def test_figures_by_hand():
    packet = make_packet(TWO, source="demo", include_ordered=True)
    k, r, u = "keep", "remove", "unsure"
    marks = {("case-1", "x"): [k, r], ("case-1", "y"): [k], ("case-2", "y"): [k, k]}
    others = {("case-1", "x"): [k, u], ("case-1", "y"): [k], ("case-2", "y"): [k, r]}
    reviews = [
        review(packet, "one", marks, overall=4),
        review(packet, "two", others, missing=["C"], overall=4),
    ]
    result = summarise_reviews(
        packet,
        [Review.model_validate(one) for one in reviews],
        TWO,
        [
            Judgement.model_validate(line)
            for line in (
                judged("case-1", "x", a=True, B=True),
                judged("case-1", "y", A=True),
                judged("case-2", "y", D=False, E=True),
                judged("case-2", "x"),
            )
        ],
        DataConfig(normalisation="string"),
    ).as_json()
    x, y, ordered = (result["models"][name] for name in ("x", "y", "ordered"))
    assert (x["format_followed"], y["format_followed"]) == (1 / 2, 1)
    assert x["similarity"]["jaccard"] == pytest.approx((1 / 3 + 0) / 2)
    assert y["similarity"]["jaccard"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert ordered["similarity"]["jaccard"] == 1
    # One keeps {A} of {A, C}; two keeps {A} and adds C.
    assert x["similarity_after_review"]["jaccard"] == pytest.approx((1 / 2 + 1) / 2)
    assert x["kept_share"] == pytest.approx((1 / 2 + 1) / 2)
    assert x["drugs"] == {"keep": 2, "remove": 1, "unsure": 1, "unmarked": 0}
    assert ordered["similarity_after_review"] is None
    assert ordered["drugs"]["unmarked"] == 2 * 3
    # Units: A kk, B ru, A kk, D kk, E kr: n = 10; observed 4 of 10 ordered pairs differ;
    # k 7, r 2, u 1: expected (7*2 + 7*1 + 2*1) * 2 = 46 of 10 * 9.
    agreement = result["agreement"]
    assert agreement["alpha_drugs"] == pytest.approx(1 - (4 / 10) / (46 / 90))
    assert agreement["unanimous"] == 3 / 5
    assert agreement["alpha_overall"] is None
    # Majorities: x A keep, x B remove, y A keep, y D keep; y E is a tie.
    judge = result["judge"]
    assert judge["drugs"] == 4
    assert judge["keep_suitable"] == 2
    assert (judge["keep_unsuitable"], judge["remove_suitable"]) == (1, 1)
    assert judge["agree"] == 1 / 2


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory.create(Config(), directory=tmp_path / "run")
    for record in TWO:
        directory.append("predictions.jsonl", record.as_json())
    directory.write_json("summary.json", {"source": "synthetic"})
    return directory


def write(path, content, **outer):
    body = json.dumps(content)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    whole = {"format": "fedrx-review-1", "sha256": checksum, "body": body, **outer}
    path.write_text(json.dumps(whole))
    return path


def packet_of(run):
    return make_packet(read_answers(run), source="synthetic")


def test_reviews_add_up_over_imports_and_a_newer_one_replaces(run, tmp_path):
    make_review(run)
    packet = packet_of(run)
    first = write(tmp_path / "a.json", review(packet, "One", {}, overall=1))
    second = write(tmp_path / "b.json", review(packet, "Two", {}, overall=3))
    assert import_reviews(run, [first]).models["y"].overall == 1
    assert import_reviews(run, [second]).models["y"].overall == 2
    newer = write(tmp_path / "c.json", review(packet, " one ", {}, overall=5))
    assert import_reviews(run, [newer]).models["y"].overall == 4
    with pytest.raises(UserError, match="same reviewer"):
        import_reviews(run, [first, newer])


def test_one_persons_work_under_two_names_is_refused(run, tmp_path):
    make_review(run)
    packet = packet_of(run)
    marks = {("case-1", "x"): ["keep", "remove"]}
    one = {**review(packet, "One", marks), "state": "s1"}
    first = write(tmp_path / "a.json", one)
    twin = write(tmp_path / "b.json", {**one, "reviewer": "Two", "state": "s2"})
    start = write(tmp_path / "c.json", {**review(packet, "Two", {}, overall=2), "state": "s1"})
    for file, why in ((twin, "all marks are the same"), (start, "from one start of the page")):
        with pytest.raises(UserError, match=f"One and Two are one person's: .*{why}"):
            import_reviews(run, [first, file])
    assert not list((run.path / "review").glob("*/reviews/*"))
    assert import_reviews(run, [first]).reviewers == ("One",)
    with pytest.raises(UserError, match="one person's"):
        import_reviews(run, [twin])
    # A comment tells two apart who agree; reviews without a mark say nothing, and are no twins.
    commented = {**one, "reviewer": "Two", "state": "s2"}
    number = next(iter(commented["cases"]))
    cases = {**commented["cases"], number: {**commented["cases"][number], "comment": "I agree"}}
    assert len(import_reviews(run, [write(twin, {**commented, "cases": cases})]).reviewers) == 2
    empty = [write(tmp_path / f"{n}.json", review(packet, n, {})) for n in ("Three", "Four")]
    assert len(import_reviews(run, empty).reviewers) == 4
    # And one's own newer file is no twin of the older.
    assert len(import_reviews(run, [first]).reviewers) == 4


def change(content, *path, to):
    *way, last = path
    place = content
    for step in way:
        place = place[step]
    place[last] = to
    return content


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (
            ("cases", "1", "lists", "A", "marks", 0),
            "KEEP",
            "cases.lists.marks: Input should be 'keep', 'remove' or 'unsure'",
        ),
        (("cases", "1", "lists", "A", "marks", 0), ["keep"], "cases.lists.marks: "),
        (
            ("cases", "1", "lists", "A", "marks"),
            ["keep"] * 9,
            "numbers of marks are not",
        ),
        (("cases", "1", "lists", "A", "marks"), "kk", "cases.lists.marks: "),
        (("cases", "1", "lists", "A", "overall"), 6, "overall"),
        (("cases", "1", "lists", "A", "overall"), True, "overall"),
        (
            ("cases", "1", "lists", "A", "missing"),
            [3],
            "cases.lists.missing: Input should be a valid string",
        ),
        (
            ("cases", "1", "lists", "A", "missing"),
            ["x"] * 500,
            "missing: Tuple should have at most 200 items",
        ),
        (("cases", "1", "lists", "C"), {}, "marks: Field required"),
        (
            ("cases", "1", "lists", "C"),
            {"marks": [], "missing": [], "overall": None},
            "lists or numbers of marks are not",
        ),
        (("cases", "1", "lists"), None, "cases"),
        (("cases", "1"), None, "cases"),
        (("cases", "7"), {"lists": {}}, "its cases, lists or"),
        (("cases",), [], "cases: Input should be a valid"),
        (("reviewer",), "  ", "reviewer: String should have at least 1 character"),
        (("reviewer",), 4, "reviewer: Input should be a valid string"),
        (("packet",), "0" * 64, "another packet"),
        (("packet",), "../../etc", "another packet"),
    ],
)
def test_a_wrong_review_is_refused_and_nothing_is_imported(run, tmp_path, path, value, complaint):
    make_review(run)
    before = run.read_json("summary.json")
    content = change(review(packet_of(run), "One", {}), *path, to=value)
    with pytest.raises(UserError, match=complaint):
        import_reviews(run, [write(tmp_path / "a.json", content)])
    assert run.read_json("summary.json") == before
    assert not list((run.path / "review").glob("*/reviews/*"))


def test_a_damaged_file_is_refused(run, tmp_path):
    make_review(run)
    file = write(tmp_path / "a.json", review(packet_of(run), "One", {}, overall=1))
    file.write_text(file.read_text().replace('overall\\": 1', 'overall\\": 5'))
    with pytest.raises(UserError, match="damaged or changed"):
        import_reviews(run, [file])


@pytest.mark.parametrize("text", ["", "{}", "[]", '"x"', "nonsense", '{"format": "other"}'])
def test_a_file_that_is_no_review_is_refused(run, tmp_path, text):
    make_review(run)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="not a review"):
        import_reviews(run, [tmp_path / "a.json"])


def test_a_changed_packet_is_refused(run, tmp_path):
    page = make_review(run)
    file = write(tmp_path / "a.json", review(packet_of(run), "One", {}))
    packet = page.parent / "packet.json"
    packet.write_text(packet.read_text().replace("Asthma", "Gout"))
    with pytest.raises(UserError, match="changed after the packet"):
        import_reviews(run, [file])


def test_other_predictions_than_the_packets_are_refused(run, tmp_path):
    make_review(run, cases=1, seed=3, include_ordered=True)
    packet = make_packet(TWO, source="synthetic", cases=1, seed=3, include_ordered=True)
    file = write(tmp_path / "a.json", review(packet, "One", {}))
    assert import_reviews(run, [file]).cases == 1
    lines = [{**line, "diagnoses": ["Gout"]} for line in run.lines("predictions.jsonl")]
    (run.path / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    with pytest.raises(UserError, match="predictions are not those"):
        import_reviews(run, [file])


def test_a_judgement_counts_only_while_the_summary_has_it(run, tmp_path):
    make_review(run)
    marks = {("case-1", "y"): ["keep"]}
    file = write(tmp_path / "a.json", review(packet_of(run), "One", marks))
    run.append("judge.jsonl", judged("case-1", "y", A=True))
    assert import_reviews(run, [file]).judge is None
    run.write_json("summary.json", {**run.read_json("summary.json"), "judge": {}})
    assert import_reviews(run, [file]).judge.agree == 1


def test_text_that_utf8_cannot_hold_is_kept_escaped_and_counted(run, tmp_path):
    """A browser writes half a character as its JSON escape."""
    make_review(run)
    content = review(packet_of(run), "Dr \ud83d", {}, missing=["half \udc00 drug"])
    result = import_reviews(run, [write(tmp_path / "a.json", content)])
    # The name, and the drug in each of the three lists (one answer was none).
    assert result.escaped_texts == 4
    assert result.reviewers == (r"Dr \ud83d",)
    (stored,) = (run.path / "review").glob("*/reviews/*.json")
    assert r"half \\udc00 drug" in stored.read_text(encoding="utf-8")
    assert import_reviews(run, [write(tmp_path / "a.json", content)]) == result
    broken = write(tmp_path / "b.json", content, body="{\ud800}")
    with pytest.raises(UserError, match="damaged"):
        import_reviews(run, [broken])


def test_a_list_that_utf8_cannot_hold_can_be_reviewed(run):
    last = {**TWO[0].as_json(), "case": "case-3", "answer": ["half \ud83d"]}
    run.append("predictions.jsonl", last)
    assert r"half \\ud83d" in make_review(run).read_text(encoding="utf-8")
