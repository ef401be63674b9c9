"""Names at three levels: typing, ingredients, the user's own map."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import DataConfig
from common.data.names import normalise, normalise_string, read_drug_map
from common.data.prepare import load_samples
from common.errors import UserError


@pytest.mark.slow
@given(st.text(max_size=40))
def test_string_level_is_idempotent_and_blind_to_case_and_blanks(text):
    once = normalise_string(text)
    assert normalise_string(once) == once
    assert normalise_string(f"  {text}\u00a0\t") == once
    assert "  " not in once


@pytest.mark.parametrize(
    ("name", "ingredients"),
    [
        ("*NF* Ertapenem Sodium", ["ertapenem"]),
        ("Albuterol 0.083% Neb Soln", ["albuterol"]),
        ("Ipratropium-Albuterol Neb", ["ipratropium", "albuterol"]),
        ("Acetaminophen-Caff-Butalbital", ["acetaminophen", "caffeine", "butalbital"]),
        ("OxycoDONE--Acetaminophen (5mg-325mg)", ["oxycodone", "acetaminophen"]),
        ("Dorzolamide 2%/Timolol 0.5% Ophth.", ["dorzolamide", "timolol"]),
        ("Sulfameth/Trimethoprim DS", ["sulfamethoxazole", "trimethoprim"]),
        ("Metoprolol Succinate XL", ["metoprolol"]),
        ("Metoprolol Tartrate", ["metoprolol"]),
        ("MethylPREDNISolone Sodium Succ", ["methylprednisolone"]),
        ("Lidocaine Jelly 2% (Glydo)", ["lidocaine"]),
        ("Diazepam - CIWA Protocol", ["diazepam"]),
        ("Insulin Glargine (CVICU Protocol)", ["insulin glargine"]),
        ("PHENObarbital Alcohol Withdrawal Dose Taper (Days 2-7)", ["phenobarbital"]),
        ("Insulin (Regular) for Hyperkalemia", ["insulin"]),
        ("Calcium Gluconate sliding scale (Critical Care-Ionized calcium)", ["calcium gluconate"]),
        ("Lenalidomide (Revlimide)15mg", ["lenalidomide"]),
        ("Filgrastim-sndz", ["filgrastim"]),
        ("23.4% Sodium Chloride", ["sodium chloride"]),
        ("EPINEPHrine 1:1000", ["epinephrine"]),
        ("Quinidine Gluconate E.R.", ["quinidine"]),
        ("Vitamin D3", ["vitamin d3"]),
        ("Sodium", ["sodium"]),
    ],
)
def test_ingredients(name, ingredients):
    assert list(normalise(name, "ingredient")) == ingredients


FORMS = """
    CHEW CP12 CP24 CPCR CPDR CPEP CREA ELIX EMUL LIQD NEBU POWD SYRP TB12 TB24 TBCR TBDP
"""


@pytest.mark.parametrize("form", FORMS.split())
def test_short_forms_of_order_entry_are_forms(form):
    assert normalise(f"DILTIAZEM HCL 120 MG PO {form}", "ingredient") == ("diltiazem",)


@pytest.mark.parametrize(
    "pair",
    [
        ("Sodium Chloride", "Sodium Bicarbonate"),
        ("Calcium Carbonate", "Calcium Acetate"),
        ("Isosorbide Dinitrate", "Isosorbide Mononitrate"),
        ("Magnesium Sulfate", "Magnesium Oxide"),
        ("HydrALAZINE", "HydrOXYzine"),
    ],
)
def test_different_substances_stay_different(pair):
    assert not set(normalise(pair[0], "ingredient")) & set(normalise(pair[1], "ingredient"))


@given(st.text(min_size=1, max_size=40))
def test_every_name_counts_as_something_at_every_level(text):
    found = normalise(text, "ingredient")
    assert bool(found) == bool(normalise_string(text))
    assert all(found)
    assert len(set(found)) == len(found)


def test_an_ingredient_is_its_own_ingredient_on_the_demo(mimic_demo, tmp_path):
    table = load_samples(DataConfig(path=str(mimic_demo)), cache_dir=tmp_path)
    names = {drug for one in table.admissions for drug in one.drugs}
    strings = {normalise_string(name) for name in names}
    ingredients = {part for name in names for part in normalise(name, "ingredient")}
    assert len(strings) == 547
    assert 380 < len(ingredients) < 430
    assert all(normalise(part, "ingredient") == (part,) for part in ingredients)
    assert not any("%" in part or "(" in part or " mg" in part for part in ingredients)


def test_map_reads_the_users_csv(tmp_path):
    path = tmp_path / "atc.csv"
    path.write_text(
        "code,note,name\nB01AC06,,  ASPIRIN \nN02BA01,,aspirin\nB01AC06,,Aspirin\n,,Nothing\n"
    )
    drug_map = read_drug_map(path)
    assert normalise("Aspirin", "map", drug_map) == ("B01AC06", "N02BA01")
    assert normalise("aspirin  ", "map", drug_map) == ("B01AC06", "N02BA01")
    assert normalise("Nothing", "map", drug_map) == ("nothing",)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"drug,code\na,b\n", "lacks column name"),
        (b"name,code\n", "maps no name"),
        (b"name,code\n,B01AC06\nAspirin,\n", "maps no name"),
        (b"", "lacks"),
        (b"name,code\nParac\xe9tamol,N02BE01\n", "cannot be read as csv"),
    ],
)
def test_a_map_that_cannot_be_used_is_one_line(tmp_path, content, word):
    path = tmp_path / "atc.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=word) as caught:
        read_drug_map(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data\.drug-map"):
        read_drug_map(tmp_path / "absent.csv")


def test_atc_levels_cut_the_codes_of_the_map(tmp_path):
    path = tmp_path / "atc.csv"
    path.write_text("name,code\nAspirin,B01AC06\nAspirin,N02BA01\nClopidogrel,B01AC04\n")
    drug_map = read_drug_map(path, "atc-4")
    assert normalise("aspirin", "atc-3", drug_map) == ("B01A", "N02B")
    assert normalise("aspirin", "atc-4", drug_map) == ("B01AC", "N02BA")
    assert normalise("clopidogrel", "atc-4", drug_map) == ("B01AC",)
    assert normalise("Nothing", "atc-3", drug_map) == ("nothing",)
    path.write_text("name,code\nAspirin,B01AC06\nSenna,A06\n")
    assert read_drug_map(path)
    with pytest.raises(UserError, match="line 3: 'A06' is no ATC code"):
        read_drug_map(path, "atc-3")


def test_levels_are_the_five():
    assert normalise("  ", "string") == ()
    with pytest.raises(ValueError, match="none of"):
        normalise("Aspirin", "atc")
