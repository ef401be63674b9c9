"""The 15 shipped class pairs: counted by hand from the paper's table, and with networkx."""

import hashlib
from itertools import combinations, product

import networkx
import numpy as np
import pytest

from common.evaluation.high_priority import CLASS_PAIRS, high_priority, warned_of
from common.evaluation.interactions import Pair, interacting, interaction_figures

# Objects, precipitants and pairs of each row, counted on paper: Table 2 of the publication, with
# 8 tricyclic antidepressants, and 40 drugs of known risk that make 40 * 39 / 2 pairs.
BY_HAND = {
    "amphetamine derivatives": (12, 5, 60),
    "atazanavir": (1, 5, 5),
    "febuxostat": (1, 2, 2),
    "SSRIs": (11, 5, 55),
    "irinotecan": (1, 23, 23),
    "narcotic analgesics": (6, 5, 30),
    "tricyclic antidepressants": (8, 5, 40),
    "QT-prolonging agents": (40, 40, 780),
    "ramelteon": (1, 4, 4),
    "protease inhibitors": (10, 6, 60),
    "HMG-CoA reductase inhibitors": (2, 20, 40),
    "ergot alkaloids": (4, 15, 60),
    "tizanidine": (1, 7, 7),
    "tranylcypromine": (1, 1, 1),
    "triptans": (3, 5, 15),
}
OF_THE_WORKBOOK = "218d0199197e5d1e94ff6c515bff7be48e64d08c29f6a06933467eafc7fe35d8"


def test_the_classes_are_as_large_as_the_papers():
    counted = {
        one.name: (len(one.objects), len(one.precipitants), len(set(one.pairs)))
        for one in CLASS_PAIRS
    }
    assert len(counted) == 15
    for (name, numbers), (begins, expected) in zip(counted.items(), BY_HAND.items(), strict=True):
        assert name.startswith(begins)
        assert numbers == expected
    for one in CLASS_PAIRS:
        assert len(set(one.objects)) == len(one.objects)
        assert len(set(one.precipitants)) == len(one.precipitants)
    # No pair is in two rows.
    assert len(high_priority().pairs) == sum(pairs for *_, pairs in BY_HAND.values()) == 1182


def test_every_member_is_the_workbooks():
    """The digest is of the pairs read from the workbook's cells by a script of its own."""
    lines = "\n".join("|".join(pair) for pair in sorted(high_priority().pairs))
    assert hashlib.sha256(lines.encode()).hexdigest() == OF_THE_WORKBOOK


@pytest.fixture(scope="module")
def graph():
    """All rows as one graph, drawn without the code that expands them."""
    union = networkx.Graph()
    for one in CLASS_PAIRS:
        if one.objects == one.precipitants:
            union.add_edges_from(networkx.complete_graph(one.objects).edges)
        else:
            union.add_edges_from(product(one.objects, one.precipitants))
    return union


def test_the_pairs_are_the_edges_of_the_rows(graph):
    assert {frozenset(pair) for pair in high_priority().pairs} == set(map(frozenset, graph.edges))
    assert set(high_priority().known) == set(graph)
    assert networkx.number_of_selfloops(graph) == 0


@pytest.mark.parametrize(
    ("first", "second", "of"),
    [
        ("pseudoephedrine", "selegiline", "amphetamine derivatives"),
        ("atazanavir", "pantoprazole", "atazanavir with proton pump"),
        ("febuxostat", "mercaptopurine", "febuxostat"),
        ("venlafaxine", "phenelzine", "SSRIs"),
        ("irinotecan", "cimetidine", "irinotecan"),
        ("dextromethorphan", "procarbazine", "narcotic"),
        ("nortriptyline", "isocarboxazid", "tricyclic"),
        ("haloperidol", "ondansetron", "QT-prolonging"),
        ("ramelteon", "ticlopidine", "ramelteon"),
        ("atazanavir", "st john's wort", "protease inhibitors"),
        ("simvastatin", "indinavir", "HMG-CoA"),
        ("ergonovine", "voriconazole", "ergot"),
        ("tizanidine", "zileuton", "tizanidine"),
        ("tranylcypromine", "procarbazine", "tranylcypromine"),
        ("zolmitriptan", "methylene blue", "triptans"),
    ],
)
def test_a_pair_of_each_row_is_there(first, second, of):
    assert high_priority().high_priority[Pair(*sorted((first, second)))].startswith(of)


def test_an_order_of_pentamidine_by_its_salt_is_known():
    """As MIMIC-IV spells it, beside amiodarone: both prolong QT."""
    orders = ("Pentamidine Isethionate", "Amiodarone HCl")
    (found,) = interacting(orders, high_priority())
    assert found.high_priority.startswith("QT-prolonging")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # What the panel turned down, and near misses of the rows.
        ("gemfibrozil", "simvastatin"),
        ("linezolid", "sumatriptan"),
        ("sildenafil", "nitroglycerin"),
        ("febuxostat", "theophylline"),
        ("indinavir", "atazanavir"),
        ("atazanavir", "famotidine"),
        ("atorvastatin", "clarithromycin"),
        ("simvastatin", "cimetidine"),
        ("ergotamine", "fluconazole"),
        ("sumatriptan", "selegiline"),
        ("haloperidol", "fluconazole"),
    ],
)
def test_what_is_in_no_row_is_not(first, second):
    assert Pair(*sorted((first, second))) not in high_priority().pairs


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Citalopram 20mg Tab", "Haloperidol Lactate"),
        ("SIMVASTATIN", "Diltiazem Extended-Release"),
        ("2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN", "AZITHROMYCIN 500 MG IVPB"),
        ("TraMADOL (Ultram)", "*NF* Selegiline HCl"),
        ("Guaifenesin-Dextromethorphan", "Phenelzine Sulfate"),
        ("RiTONAvir", "Lovastatin 20 mg"),
        ("CITALOPRAM HBr 20 mg PO TABS", "quiniDINE Gluconate E.R."),
        ("PANTOPRAZOLE SODIUM 40 MG PO TBEC", "Atazanavir Sulfate"),
    ],
)
def test_names_as_tables_write_them_are_known(first, second):
    (found,) = interacting((first, "Sodium Chloride 0.9%  Flush", second), high_priority())
    assert found[:2] == (first, second)
    assert found.high_priority


def test_the_rate_against_a_count_by_hand():
    """Haloperidol, ondansetron, methadone: three pairs of six; fentanyl, selegiline: one."""
    lists = [
        ("Haloperidol", "Ondansetron ODT", "Methadone", "Senna"),
        ("Fentanyl Citrate", "Fentanyl Patch", "Selegiline HCl", "Hydroxychloroquine Sulfate"),
        ("Senna", "Docusate Sodium"),
        ("Simvastatin",),
    ]
    figures = interaction_figures(lists, high_priority())
    # Ingredients: 4, 3, 2, 1; pairs: 6, 3, 1, 0; named in a row: 3, 2, 0, 1.
    assert figures == (4 / 10, 10, 4, 4 / 10, 6, 2)


def test_the_rate_against_networkx(graph):
    members, random = sorted(graph), np.random.default_rng(2)
    lists = [
        random.choice([*members, "senna", "warfarin"], size, replace=False).tolist()
        for size in (2, 5, 12, 30, 60)
    ]
    dressed = [[f"{name.upper()} 10 mg Tab" for name in one] for one in lists]
    figures = interaction_figures(dressed, high_priority())
    edges = [graph.subgraph(one).number_of_edges() for one in lists]
    assert figures.interacting == sum(edges) > 0
    assert figures.lists == sum(edge > 0 for edge in edges)
    assert figures.pairs == sum(len(list(combinations(one, 2))) for one in lists)
    assert figures.known == sum(name in graph for one in lists for name in one)


def test_people_are_warned_of_the_list_and_of_their_file(tmp_path):
    file = tmp_path / "pairs.csv"
    text = "drug_a,drug_b,Severity\nWarfarin,Aspirin,Major\nSenna,Aspirin,Minor\n"
    file.write_text(text + "Haloperidol,Methadone,Minor\n", "utf-8")
    drugs = ("Senna", "Aspirin 81 mg Tab", "Warfarin", "Haloperidol", "Methadone", "Selegiline")
    assert interacting(drugs, warned_of(str(file))) == [
        ("Senna", "Aspirin 81 mg Tab", ""),
        ("Aspirin 81 mg Tab", "Warfarin", "major in the file of interactions"),
        # A file cannot take a pair off the shipped list.
        ("Haloperidol", "Methadone", "QT-prolonging agents with one another"),
        ("Methadone", "Selegiline", "narcotic analgesics with MAO inhibitors"),
    ]
    assert warned_of("") == high_priority()
