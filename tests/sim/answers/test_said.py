"""What is said of judgements and reviews."""

import io

from common.records.judged import (
    AgainstJudge,
    Agreement,
    Appropriateness,
    Counts,
    Judged,
    Reviewed,
    ReviewedModel,
)
from sim.answers.judge import judgement_parts
from sim.answers.review import review_parts
from sim.cli.terminal import Terminal


def said(parts, width=120) -> list[str]:
    """Lines of the terminal, with one blank between words and without a table's lines."""
    shown = io.StringIO()
    Terminal(file=shown, width=width).say(*parts)
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    return [line for line in lines if any(map(str.isalpha, line))]


def test_a_judgement_is_said_by_model_and_judge_with_what_is_not_in_the_mean():
    fedrx = Appropriateness(mean=0.8114, interval=(0.7, 0.9), scored=3, unscored=1, empty=2)
    result = Judged(
        judges={
            "[red]one": Judged(
                appropriateness={"fedrx": fedrx, "[b]x": Appropriateness()},
                judgements=Counts(problems={"empty": 1, "cut": 3}),
            )
        },
        judgements=Counts(escaped_texts=2),
        agreement=Agreement(alpha=0.3, unanimous=0.5, drugs=4),
        flip_rate=0.25,
        usage=Counts(calls=10, input_tokens=100_000, output_tokens=3),
        cost_usd=1.5,
        invocation=Counts(calls=5, input_tokens=1, output_tokens=2, cost_usd=0.5),
    )
    assert said(judgement_parts(result)) == [
        "Appropriateness by [red]one (research only)",
        "list by suitable 95% interval scored unscored no list empty",
        "fedrx 81.1% 70.0-90.0% 3 1 0 2",
        "[b]x - - 0 0 0 0",
        "unscored by [red]one: 3 x cut, 1 x empty",
        "2 texts of judges could not be written as UTF-8, and are escaped",
        "agreement on 4 drugs: unanimous 50.0%, Krippendorff's alpha 0.300, flip rate 25.0%",
        "this time: 5 calls, 1 tokens in, 2 out, 0.5000 USD",
        "all together: 10 calls, 100,000 tokens in, 3 out, 1.5000 USD",
    ]


def test_the_table_of_two_servers_judges_is_whole_at_80_columns():
    sure = Appropriateness(mean=1.0, interval=(1.0, 1.0), scored=12345, unscored=678)
    models = ("fedrx", "logistic-regression", "x" * 30)
    judges = [f"judge at http://127.0.0.1:{port}/v1" for port in (43567, 43568)]
    theirs = Judged(appropriateness=dict.fromkeys(models, sure))
    lines = said(judgement_parts(Judged(judges=dict.fromkeys(judges, theirs))), width=80)
    figures = "100.0% 100.0-100.0% 12345 678 0 0"
    for judge in judges:
        start = lines.index(f"Appropriateness by {judge} (research only)")
        assert lines[start + 1] == "list by suitable 95% interval scored unscored no list empty"
        assert lines[start + 2 : start + 4] == [f"{name} {figures}" for name in models[:2]]
        folded = lines[start + 4].partition(" ")
        assert folded[0] + lines[start + 5] == models[2]
        assert folded[2] == figures


def test_reviews_are_said_by_model_with_how_far_reviewers_and_judge_agree():
    fedrx = ReviewedModel(
        format_followed=1.0,
        similarity={"jaccard": 0.3},
        kept_share=0.4,
        overall=3.2,
        lists_reviewed=6,
    )
    result = Reviewed(
        reviewers=("a", "b"),
        cases=3,
        level="string",
        models={"fedrx": fedrx},
        agreement=Agreement(alpha_drugs=0.1, unanimous=0.5, drugs=4),
        judge=AgainstJudge(drugs=3, agree=0.5, alpha=0.2),
        escaped_texts=1,
    )
    assert said(review_parts(result)) == [
        "2 reviewers, 3 cases (names equal at level string)",
        "┃ list by ┃ in format ┃ similarity ┃ after review ┃ kept ┃ overall 1-5 ┃ lists reviewed ┃",
        "│ fedrx │ 100.0% │ 30.0% │ - │ 40.0% │ 3.2 │ 6 │",
        "1 texts could not be written as UTF-8, and are escaped",
        "reviewers on 4 drugs: unanimous 50.0%, alpha 0.100 (overall marks -)",
        "reviewers and judge on 3 drugs: agree 50.0%, alpha 0.200",
    ]
