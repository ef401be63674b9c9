"""The rate of interacting pairs against networkx, and files that are none."""

import networkx
import numpy as np
import pytest

from common.data.names import read_drug_map
from common.errors import UserError
from common.evaluation.interactions import interacting, interaction_figures, read_interactions

NAMES = [f"drug{letter}" for letter in "abcdefghijklmnopqrst"]


def write(tmp_path, text):
    file = tmp_path / "pairs.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.fixture
def graph():
    return networkx.gnp_random_graph(len(NAMES), 0.2, seed=3)


@pytest.mark.parametrize("form", ["drug_a,drug_b", "DDInterID_A,Drug_A,DDInterID_B,Drug_B,Level"])
def test_the_rate_is_the_density_of_the_lists_in_the_graph(tmp_path, graph, form):
    """Edges of the subgraph that each list induces, over its pairs."""
    ours = len(form.split(",")) == 2
    rows = [
        f"{NAMES[a]},{NAMES[b]}" if ours else f"1,{NAMES[b].upper()},2, {NAMES[a]} ,Major"
        for a, b in graph.edges
    ]
    found = read_interactions(write(tmp_path, "\n".join([form, *rows])))
    assert len(found.pairs) == graph.number_of_edges()
    random = np.random.default_rng(0)
    lists = [random.choice(len(NAMES), size, replace=False).tolist() for size in (1, 2, 5, 9, 20)]
    figures = interaction_figures([[NAMES[i] for i in one] for one in lists], found)
    edges = [graph.subgraph(one).number_of_edges() for one in lists]
    pairs = sum(len(one) * (len(one) - 1) // 2 for one in lists)
    assert figures[:3] == (sum(edges) / pairs, pairs, sum(edges))
    degree = dict(graph.degree)
    listed = [place for one in lists for place in one]
    assert figures.unknown == pytest.approx(sum(degree[i] == 0 for i in listed) / len(listed))
    assert figures.known == sum(degree[i] > 0 for i in listed)
    assert figures.lists == sum(count > 0 for count in edges)


def test_strengths_salts_and_combinations_are_ingredients(tmp_path):
    found = read_interactions(write(tmp_path, "drug_a,drug_b\nWarfarin,Aspirin\nCodeine,Aspirin\n"))
    drugs = ("Aspirin 81 mg Tab", "Warfarin Sodium", "Acetaminophen w/Codeine", "Senna")
    assert interacting(drugs, found) == [
        ("Aspirin 81 mg Tab", "Warfarin Sodium", ""),
        ("Aspirin 81 mg Tab", "Acetaminophen w/Codeine", ""),
    ]
    assert interaction_figures([drugs], found).pairs == 10  # of five ingredients
    assert interaction_figures([("Senna",)], found).rate is None


def test_a_pair_has_no_order_and_nothing_interacts_with_itself(tmp_path):
    text = "drug_a,drug_b\nA1,B1\nB1,A1\nA1,B1\nC1,C1\n"
    found = read_interactions(write(tmp_path, text))
    assert found.pairs == {("a1", "b1")}


@pytest.mark.parametrize("column", ["Level", "severity"])
def test_a_severity_makes_a_pair_one_of_high_priority(tmp_path, column):
    rows = ["A1,B1,Major", "C1,A1,moderate", "C1,B1,", "D1,A1, CONTRAINDICATED", "E1,A1"]
    text = "\n".join([f"Drug_A,Drug_B,{column}", *rows])
    found = read_interactions(write(tmp_path, text))
    assert len(found.pairs) == 5
    assert found.high_priority == {
        ("a1", "b1"): "major in the file of interactions",
        ("a1", "d1"): "contraindicated in the file of interactions",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,code\nA,B\n", "has other columns; allowed: Drug_A,Drug_B or drug_a,drug_b"),
        ("", "has other columns"),
        ("drug_a,drug_b\nA1,B1\nA1,\n", "line 3 names one drug alone"),
        ("drug_a,drug_b\nA1\n", "line 2 names one drug alone"),
        ("drug_a,drug_b\n", "holds no pair"),
        (b"drug_a,drug_b\n\xff,b\n", "cannot be read as csv"),
    ],
)
def test_a_file_that_holds_no_pairs_is_one_line(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        read_interactions(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.interactions=.*No such file"):
        read_interactions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_interactions, "drug_a,drug_b\nInsulin, regular,Aspirin\n"),
        (read_drug_map, "name,code\nInsulin, regular,A10AB01\n"),
    ],
)
def test_a_comma_in_a_name_without_quotes_moves_no_cell_in_silence(tmp_path, read, text):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="line 2 has more fields than the header"):
        read(path)
    path.write_text(text.replace("Insulin, regular", '"Insulin, regular"'))
    assert read(path)
