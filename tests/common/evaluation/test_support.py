"""Support by hand on five admissions."""

from common.data.samples import Admission
from common.evaluation.support import NEIGHBOURS, Support, SupportIndex


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
    assert Support(ordered=1, similar=2).share == 0.5


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
