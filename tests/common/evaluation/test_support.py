"""Support by hand on five admissions."""

import random

from common.data.samples import Admission
from common.evaluation.support import NEIGHBOURS, Support, SupportIndex, category


def one(codes, drugs):
    return Admission(
        patient=1, admission=1, sex="F", age=50, diagnosis_codes=tuple(codes), drugs=tuple(drugs)
    )


TRAIN = [
    one(["10:I509", "10:I10"], ["Furosemide", "Aspirin"]),
    one(["10:I5021"], ["FUROSEMIDE "]),
    one(["9:4280"], ["Digoxin"]),
    one(["10:E119"], ["Insulin"]),
    one([], ["Heparin"]),
]


def test_support_counts_orders_among_admissions_that_share_a_category():
    index = SupportIndex(TRAIN)
    assert index.similar(["10:I5033"]) == [1, 0]
    assert index.support(["10:I5033"], ["furosemide", "Aspirin", "Insulin"]) == [
        Support(ordered=2, similar=2),
        Support(ordered=1, similar=2),
        Support(ordered=0, similar=2),
    ]


def test_nothing_similar_is_no_support():
    index = SupportIndex(TRAIN)
    assert index.support(["10:Z66"], ["Insulin"]) == [None]
    assert index.support([], ["Insulin", "Aspirin"]) == [None, None]
    assert index.support(["", ""], ["Insulin"]) == [None]


def test_only_the_nearest_count():
    index = SupportIndex([one(["10:I10", "10:J90"], ["A"])] + [one(["10:I10"], ["B"])] * 60)
    near = index.similar(["10:I10"])
    assert len(near) == NEIGHBOURS
    assert near[:2] == [1, 2]
    assert 0 not in near


def test_neighbours_are_those_of_a_plain_loop():
    draw = random.Random(0)
    pool = [f"10:{draw.choice('ABCD')}{draw.randrange(30):02d}{n % 10}" for n in range(60)]
    drawn = [tuple(draw.sample(pool, draw.randint(0, 8))) for _ in range(200)]
    train = [
        Admission(patient=n, admission=n, sex="F", age=50, diagnosis_codes=codes, drugs=("a",))
        for n, codes in enumerate(drawn)
    ]
    index = SupportIndex(train)
    for _ in range(40):
        codes = [*draw.sample(pool, draw.randint(0, 6)), "", "9:unseen"]
        asked = {category(code) for code in codes if code}
        scored = []
        for place, own in enumerate(drawn):
            other = set(map(category, own))
            if asked & other:
                scored.append((-len(asked & other) / len(asked | other), place))
        assert index.similar(codes) == [place for _, place in sorted(scored)[:NEIGHBOURS]]
