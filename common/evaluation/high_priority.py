"""The high-priority interactions of Phansalkar et al., JAMIA 2012;19(5):735-743 (Table 2).

An expert panel agreed on 15 pairs of drug classes that every electronic record should warn of. It
called its list a minimum, not a complete one, and contraindicated in general, not for a patient;
it is of 2012 and says nothing of dose, route or indication. Here it is for research: no list of
FedRx is safe because nothing in it is named below, and no pair is advice.

Members, by US generic names, are those of the paper as the workbook "ONC High Priority List"
(sheet "Revised Table 2", L. Hines and D. Malone, retrieved 2014-07-01) of Ayvaz et al., J Biomed
Inform 2015;55:206 tabulates them, https://github.com/dbmi-pitt/public-PDDI-analysis (folder
PDDI-Datasets/ONC-High-Priority). That folder also fills the two classes that the paper leaves
open: tricyclic antidepressants, and QT-prolonging agents by CredibleMeds' list "known risk of
torsades de pointes" as of June 2014. Spelling slips were mended (esomeprazole, voriconazole), and
one cell ("NSAID" among protease inhibitors) is atazanavir, as the workbook's first sheet has it.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from common.data.names import normalise
from common.evaluation.interactions import Interactions, Pair, read_interactions

CITATION = "Phansalkar et al., JAMIA 2012;19:735"


class ClassPair(NamedTuple):
    """Two classes of drugs that should not be ordered together."""

    name: str
    objects: tuple[str, ...]
    """Drugs whose effect changes."""
    precipitants: tuple[str, ...]
    """Drugs that change it."""

    @property
    def pairs(self) -> Iterator[Pair]:
        """Every object with every precipitant, as ingredients; no drug with itself."""
        changing = [normalise(drug, "ingredient") for drug in self.precipitants]
        for first in (normalise(drug, "ingredient") for drug in self.objects):
            for second in changing:
                if first != second:
                    yield Pair(*sorted((*first, *second)))


def _names(text: str) -> tuple[str, ...]:
    """Split at commas: some names are two words."""
    return tuple(" ".join(name.split()) for name in text.split(","))


_MAO_INHIBITORS = _names("tranylcypromine, phenelzine, isocarboxazid, procarbazine, selegiline")
_PROTEASE_INHIBITORS = _names("""
    amprenavir, atazanavir, darunavir, indinavir, lopinavir, nelfinavir, ritonavir, saquinavir,
    tipranavir
""")
_MACROLIDES = _names("clarithromycin, erythromycin, telithromycin")
_SLOWED_BY = _names("amiodarone, verapamil, diltiazem")
_AZOLES = _names("ketoconazole, itraconazole, voriconazole")
_QT_PROLONGING = _names("""
    amiodarone, anagrelide, arsenic trioxide, astemizole, azithromycin, bepridil, chloroquine,
    chlorpromazine, cisapride, citalopram, clarithromycin, cocaine, disopyramide, dofetilide,
    domperidone, dronedarone, droperidol, erythromycin, escitalopram, flecainide, halofantrine,
    haloperidol, ibutilide, levomethadyl, mesoridazine, methadone, moxifloxacin, ondansetron,
    pentamidine, pimozide, probucol, procainamide, quinidine, sevoflurane, sotalol, sparfloxacin,
    sulpiride, terfenadine, thioridazine, vandetanib
""")

CLASS_PAIRS = (
    ClassPair(
        "amphetamine derivatives with MAO inhibitors",
        _names("""
            amphetamine, atomoxetine, benzphetamine, dexmethylphenidate, dextroamphetamine,
            diethylpropion, lisdexamfetamine, methamphetamine, methylphenidate, phendimetrazine,
            phentermine, pseudoephedrine
        """),
        _MAO_INHIBITORS,
    ),
    ClassPair(
        "atazanavir with proton pump inhibitors",
        ("atazanavir",),
        _names("esomeprazole, lansoprazole, omeprazole, pantoprazole, rabeprazole"),
    ),
    ClassPair(
        "febuxostat with azathioprine or mercaptopurine",
        ("febuxostat",),
        _names("azathioprine, mercaptopurine"),
    ),
    ClassPair(
        "SSRIs and other serotonergic agents with MAO inhibitors",
        _names("""
            citalopram, desvenlafaxine, duloxetine, escitalopram, fluoxetine, fluvoxamine,
            milnacipran, nefazodone, paroxetine, sertraline, venlafaxine
        """),
        _MAO_INHIBITORS,
    ),
    ClassPair(
        "irinotecan with strong CYP3A4 inhibitors",
        ("irinotecan",),
        (
            *(*_PROTEASE_INHIBITORS, "fosamprenavir", *_MACROLIDES, *_SLOWED_BY, *_AZOLES),
            *_names("fluconazole, nefazodone, aprepitant, cimetidine"),
        ),
    ),
    ClassPair(
        "narcotic analgesics with MAO inhibitors",
        _names("dextromethorphan, fentanyl, meperidine, methadone, tapentadol, tramadol"),
        _MAO_INHIBITORS,
    ),
    ClassPair(
        "tricyclic antidepressants with MAO inhibitors",
        _names("""
            amitriptyline, clomipramine, desipramine, doxepin, imipramine, nortriptyline,
            protriptyline, trimipramine
        """),
        _MAO_INHIBITORS,
    ),
    ClassPair("QT-prolonging agents with one another", _QT_PROLONGING, _QT_PROLONGING),
    ClassPair(
        "ramelteon with CYP1A2 inhibitors",
        ("ramelteon",),
        _names("amiodarone, ciprofloxacin, fluvoxamine, ticlopidine"),
    ),
    ClassPair(
        "protease inhibitors with strong CYP3A4 inducers",
        (*_PROTEASE_INHIBITORS, "fosamprenavir"),
        _names("bosentan, carbamazepine, rifabutin, rifampin, rifapentine, st john's wort"),
    ),
    ClassPair(
        "HMG-CoA reductase inhibitors with CYP3A4 inhibitors",
        _names("lovastatin, simvastatin"),
        (
            *(*_PROTEASE_INHIBITORS, *_MACROLIDES, *_SLOWED_BY, *_AZOLES),
            *_names("fluconazole, nefazodone"),
        ),
    ),
    ClassPair(
        "ergot alkaloids with CYP3A4 inhibitors",
        _names("dihydroergotamine, ergonovine, ergotamine, methylergonovine"),
        _PROTEASE_INHIBITORS + _MACROLIDES + _AZOLES,
    ),
    ClassPair(
        "tizanidine with CYP1A2 inhibitors",
        ("tizanidine",),
        _names("""
            amiodarone, ciprofloxacin, fluvoxamine, mexiletine, propafenone, ticlopidine, zileuton
        """),
    ),
    ClassPair("tranylcypromine with procarbazine", ("tranylcypromine",), ("procarbazine",)),
    ClassPair(
        "triptans with MAO inhibitors",
        _names("rizatriptan, sumatriptan, zolmitriptan"),
        _names("isocarboxazid, methylene blue, moclobemide, phenelzine, tranylcypromine"),
    ),
)


@cache
def high_priority() -> Interactions:
    """Return the list as pairs of ingredients; each knows the first class pair that holds it."""
    classes: dict[Pair, str] = {}
    for one in CLASS_PAIRS:
        for pair in one.pairs:
            classes.setdefault(pair, one.name)
    return Interactions(
        pairs=frozenset(classes),
        known=frozenset(name for pair in classes for name in pair),
        high_priority=classes,
    )


def warned_of(file: str) -> Interactions:
    """Return what a person is warned of: this list, and the pairs of the user's file.

    Args:
        file: ``evaluation.interactions``; empty: none.

    Raises:
        UserError: As ``read_interactions``.
    """
    ours = high_priority()
    if not file:
        return ours
    theirs = read_interactions(Path(file).expanduser())
    return Interactions(
        pairs=ours.pairs | theirs.pairs,
        known=ours.known | theirs.known,
        high_priority={**theirs.high_priority, **ours.high_priority},
    )
