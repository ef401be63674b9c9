"""Drug names at three levels of equality: one normaliser for both sides of every comparison.

``string`` folds what only typing changes. ``ingredient`` reduces an order line to its active
ingredients by rules alone: no dictionary, so it works offline and gives the same on every machine
(brand names stay themselves). ``map`` looks the string-level name up in the user's own csv, for
instance with ATC codes.
"""

import csv
import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.errors import UserError

ATC_CHARACTERS = {"atc-3": 4, "atc-4": 5}
"""What each level keeps of an ATC code: B01A is of level 3, B01AC of level 4."""
LEVELS = ("string", "ingredient", "map", *ATC_CHARACTERS)
DrugMap = Mapping[str, tuple[str, ...]]

_SALT_WORDS = """
acetate acetonide axetil besylate bitartrate bromide calcium camsylate carbonate chloride cilexetil
citrate decanoate dihydrate dimesylate dipropionate disodium disoproxil edisylate estolate etexilate
ethylsuccinate fumarate furoate gluceptate gluconate hydrobromide hydrochloride hyclate iodide
isethionate
lactate lactobionate magnesium malate maleate medoxomil mesylate mofetil monohydrate nitrate oxalate
palmitate pamoate phosphate pivoxil polacrilex potassium propionate proxetil salicylate sodium
stearate succinate sulfate tartrate tosylate trihydrate tromethamine valerate xinafoate
"""
_FORM_WORDS = """
bag bolus buffered cap caps capsule capsules chewable coated conc concentrate cr cream crrt delayed
diskus disintegrating dr drip drops ds dwell ec elixir emulsion enema enteric epidural er extended
extended-release film flush foam free gel glydo hp im immediate implant infatab infusion inh
inhalation inhaler injection intravenous inj ir iv jelly la liquid lotion lozenge mdi nasal neb nebs
nebulization nf odt oint ointment ophth ophthalmic oral otic packet paste patch pca pen pf po powder
premix preserv preservative pump rectal regular release rinse sc sl soln solution spray sprinkles sr
ss strip subcutaneous sublingual supp suppository supps susp suspension sustained syringe syrup tab
tablet tablets tabs topical transdermal troche vag vaginal vial viscous wafer xl xr human
chew cp12 cp24 cpcr cpdr cpep crea elix emul ij ivpb liqd nebu powd solr syrp tb12 tb24 tbcr tbdp
tbec
"""
"""The last two lines are the short forms of US order entry, as in eICU: ``4 MG/2ML IJ SOLN``."""
_MINERAL_WORDS = """
aluminum ammonium calcium ferric ferrous iron lithium magnesium potassium silver sodium zinc
"""
_SALTS = frozenset(_SALT_WORDS.split())
_FORMS = frozenset(_FORM_WORDS.split())
_MINERALS = frozenset(_MINERAL_WORDS.split())
"""A mineral keeps its anion: sodium chloride is not sodium."""
_LONG_FORMS = {
    "caff": "caffeine",
    "hbr": "hydrobromide",
    "hcl": "hydrochloride",
    "hydrox": "hydroxide",
    "monohyd": "monohydrate",
    "multivitamins": "multivitamin",
    "na": "sodium",
    "sod": "sodium",
    "succ": "succinate",
    "sulfameth": "sulfamethoxazole",
    "sulphate": "sulfate",
    "tears": "tear",
    "vac": "vaccine",
}
_ATC = re.compile(r"[A-Z]\d\d[A-Z]{2}\d\d")
_MARK = re.compile(r"\*[^*]*\*|_+")
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
_PROTOCOL = re.compile(
    r"\s-\s.*$|\sfor\s.*$|-heart failure$"
    r"|\s(?:sliding scale|replacement|desensitization|alcohol withdrawal|taper|\S+ protocol"
    r"|protocol|study drug)\b.*$"
)
_UNIT = r"(?:mcg|mg|gm?|grams?|kg|ml|l|meq|mmol|units?|iu|%|hr|hours?|h)"
_STRENGTH = re.compile(
    rf"(?<![a-z\d])\d[\d.,:]*(?:\s*{_UNIT})?(?:\s*/\s*(?:\d[\d.,]*\s*)?{_UNIT})?(?![a-z\d])"
    rf"|(?<=[a-z])\d[\d.,]*\s*{_UNIT}(?![a-z])"
)
_WITH = re.compile(r"\s*\bw/\s*|\s+(?:and|with)\s+|\s*[/+&;]\s*")
_HYPHEN = re.compile(r"\s*--\s*|(?<=[a-z.]{3})-(?!phos\b)(?=[a-z]{4})")
_SUFFIX = re.compile(r"((?:ase|cept|fa|gine|lin|mab|stim))-[a-z]{4}$|-[a-z]{2}$")
"""The four letters of a biosimilar, and forms such as -hp."""


def normalise(name: str, level: str, drug_map: DrugMap | None = None) -> tuple[str, ...]:
    """Return what ``name`` counts as: one item, or several for a combination.

    Args:
        name: As in the table, in an answer, or anywhere else.
        level: ``string``, ``ingredient``, ``map``, ``atc-3`` or ``atc-4``.
        drug_map: From ``read_drug_map``, for ``map`` and the ATC levels. A name that is not in it
            stays its string-level self, and so equals nothing but itself.

    Returns:
        Items without duplicates; empty for a blank name.

    >>> normalise("Acetaminophen w/Codeine 300 mg Tab", "ingredient")
    ('acetaminophen', 'codeine')
    >>> normalise("Metoprolol Succinate XL", "string")
    ('metoprolol succinate xl',)
    >>> normalise("Aspirin", "map", {"aspirin": ("B01AC06",)})
    ('B01AC06',)
    >>> normalise("Aspirin", "atc-3", {"aspirin": ("B01AC06", "B01AX01")})
    ('B01A',)
    """
    folded = normalise_string(name)
    if not folded:
        return ()
    if level == "string":
        return (folded,)
    if level == "ingredient":
        return _ingredients(folded)
    if level == "map":
        return (drug_map or {}).get(folded, (folded,))
    if level in ATC_CHARACTERS:
        codes = (drug_map or {}).get(folded)
        kept = ATC_CHARACTERS[level]
        return (folded,) if codes is None else tuple(dict.fromkeys(code[:kept] for code in codes))
    raise ValueError(f"level {level!r} is none of {LEVELS}")


def normalise_string(name: str) -> str:
    """Fold what only typing changes: NFKC, case, blanks.

    >>> normalise_string("  Sodium  Chloride 0.9%  FLUSH ")
    'sodium chloride 0.9% flush'
    """
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def read_drug_map(path: Path, level: str = "map") -> dict[str, tuple[str, ...]]:
    """Read a csv with columns ``name`` and ``code``; a name on several rows has several codes.

    Args:
        path: The csv.
        level: The ATC levels need codes of level 5, such as B01AC06 (WHO sells the index; so none
            is shipped).

    Raises:
        UserError: The file cannot be read, lacks a column, is empty, or a code is not of ATC's
            form where the level asks for it.
    """
    codes: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            missing = {"name", "code"} - set(rows.fieldnames or ())
            if missing:
                raise UserError(
                    f"data.drug-map={path} lacks column {', '.join(sorted(missing))}",
                    allowed="a csv with columns name,code",
                    fix="add the header name,code",
                )
            for row in rows:
                require_no_more(row, f"data.drug-map={path}, line {rows.line_num}")
                name, code = normalise_string(row["name"] or ""), (row["code"] or "").strip()
                if code and level in ATC_CHARACTERS and not _ATC.fullmatch(code):
                    raise UserError(
                        f"data.drug-map={path}, line {rows.line_num}: {code[:20]!r} is no ATC code",
                        allowed="ATC codes of level 5, such as B01AC06",
                        fix=f"mend it, or set data.normalisation to another level than {level}",
                    )
                if name and code and code not in codes.setdefault(name, []):
                    codes[name].append(code)
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(
            f"data.drug-map={path} cannot be read as csv",
            allowed="a csv with columns name,code",
            fix="set data.drug-map",
        ) from None
    found = {name: tuple(entries) for name, entries in codes.items() if entries}
    if not found:
        raise UserError(f"data.drug-map={path} maps no name", fix="fill in name,code")
    return found


def require_no_more(row: Mapping[Any, Any], where: str) -> None:
    """Refuse a row of csv.DictReader that is longer than its header: cells may have moved.

    Raises:
        UserError: It is, as happens where a name holds a comma and has no quotes.
    """
    if any(row.get(None) or ()):
        raise UserError(
            f"{where} has more fields than the header",
            allowed="as many, with quotes around a name that holds a comma",
            fix="put the name into quotes",
        )


@lru_cache(maxsize=65536)
def _ingredients(folded: str) -> tuple[str, ...]:
    bare = _MARK.sub(" ", folded)
    bare = _PROTOCOL.sub("", _BRACKETS.sub(" ", bare))
    bare = _SUFFIX.sub(r"\1", _STRENGTH.sub(" ", bare).strip())
    parts = [piece for part in _WITH.split(bare) for piece in _HYPHEN.split(part)]
    found = dict.fromkeys(core for part in parts if (core := _core(part)))
    return tuple(found) or (folded,)


def _core(part: str) -> str:
    """Drop dosage forms everywhere, and salts from the end where a molecule stands before them."""
    words = [word for raw in part.split() if (word := _word(raw)) and word not in _FORMS]
    while len(words) > 1 and words[-1] in _SALTS and not _MINERALS.issuperset(words[:-1]):
        words.pop()
    return " ".join(words)


def _word(raw: str) -> str:
    word = raw.strip(".,:-'\"")
    undotted = word.replace(".", "")
    return _LONG_FORMS.get(undotted, undotted if undotted in _FORMS else word)
