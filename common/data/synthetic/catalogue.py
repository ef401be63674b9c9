"""What the synthetic source can say: diagnosis groups, the drugs they imply, and hospital words.

ICD-9-CM and ICD-10-CM codes and titles are the public ones of the U.S. government; which drugs
stand beside a group, and how often, is invented for teaching a model, and is no clinical advice.
"""

from typing import NamedTuple


class Code(NamedTuple):
    """One ICD code, as MIMIC-IV writes it (no dot, leading zeros kept)."""

    code: str
    version: int
    title: str


class Group(NamedTuple):
    """One diagnosis group: how common it is, how it is coded, and what it implies."""

    name: str
    prevalence: float
    """Share of patients (chronic) or admissions (acute) at 60 years."""
    per_decade: float
    """Change of the log odds for each decade of age beyond 60."""
    chronic: bool
    service: str
    codes: tuple[Code, ...]
    drugs: tuple[tuple[str, float], ...]
    """Drug names with their probability given the group."""
    sex: str = ""


class Drug(NamedTuple):
    """One drug as an order line carries it."""

    name: str
    formulary: str
    strength: str
    form: str
    dose: str
    unit: str
    route: str


def _codes(nine: str, ten: str) -> tuple[Code, ...]:
    """Read ``code title`` entries, one version a text, entries divided by ``|``."""
    found = []
    for version, text in ((9, nine), (10, ten)):
        for entry in text.split("|"):
            code, title = entry.strip().split(" ", 1)
            found.append(Code(code, version, title))
    return tuple(found)


GROUPS: tuple[Group, ...] = (
    Group("hypertension", 0.42, 0.25, True, "MED",
          _codes("4019 Unspecified essential hypertension", "I10 Essential (primary) hypertension"),
          (("Lisinopril", 0.85), ("AmLODIPine", 0.65))),
    Group("hyperlipidemia", 0.32, 0.2, True, "MED",
          _codes("2724 Other and unspecified hyperlipidemia", "E785 Hyperlipidemia, unspecified"),
          (("Atorvastatin", 0.92),)),
    Group("diabetes", 0.22, 0.1, True, "MED",
          _codes("25000 Diabetes mellitus without mention of complication, type II or unspecified "
                 "type, not stated as uncontrolled",
                 "E119 Type 2 diabetes mellitus without complications"
                 "|E1165 Type 2 diabetes mellitus with hyperglycemia"),
          (("Insulin", 0.96), ("Glucose Gel", 0.8), ("Glucagon", 0.75))),
    Group("coronary disease", 0.16, 0.35, True, "CMED",
          _codes("41401 Coronary atherosclerosis of native coronary artery",
                 "I2510 Atherosclerotic heart disease of native coronary artery without angina "
                 "pectoris"),
          (("Aspirin", 0.93), ("Metoprolol Succinate XL", 0.75), ("Nitroglycerin SL", 0.5))),
    Group("heart failure", 0.12, 0.4, True, "CMED",
          _codes("4280 Congestive heart failure, unspecified"
                 "|42833 Acute on chronic diastolic heart failure",
                 "I509 Heart failure, unspecified"
                 "|I5033 Acute on chronic diastolic (congestive) heart failure"),
          (("Furosemide", 0.96), ("Carvedilol", 0.75), ("Spironolactone", 0.6))),
    Group("atrial fibrillation", 0.11, 0.45, True, "CMED",
          _codes("42731 Atrial fibrillation", "I4891 Unspecified atrial fibrillation"),
          (("Warfarin", 0.85), ("Diltiazem", 0.65))),
    Group("obstructive lung disease", 0.1, 0.2, True, "MED",
          _codes("496 Chronic airway obstruction, not elsewhere classified",
                 "J449 Chronic obstructive pulmonary disease, unspecified"),
          (("Albuterol 0.083% Neb Soln", 0.92), ("Ipratropium Bromide Neb", 0.88),
           ("Tiotropium Bromide", 0.65))),
    Group("asthma", 0.06, -0.15, True, "MED",
          _codes("49390 Asthma, unspecified type, unspecified",
                 "J45909 Unspecified asthma, uncomplicated"),
          (("Albuterol Inhaler", 0.92), ("Fluticasone Propionate 110mcg", 0.65),
           ("Montelukast", 0.5))),
    Group("chronic kidney disease", 0.1, 0.25, True, "MED",
          _codes("5853 Chronic kidney disease, Stage III (moderate)",
                 "N183 Chronic kidney disease, stage 3 (moderate)"),
          (("Calcitriol", 0.75), ("Sevelamer CARBONATE", 0.7))),
    Group("reflux", 0.18, 0.05, True, "MED",
          _codes("53081 Esophageal reflux",
                 "K219 Gastro-esophageal reflux disease without esophagitis"),
          (("Omeprazole", 0.92),)),
    Group("depression", 0.16, -0.1, True, "MED",
          _codes("311 Depressive disorder, not elsewhere classified",
                 "F329 Major depressive disorder, single episode, unspecified"),
          (("Sertraline", 0.85), ("TraZODone", 0.5))),
    Group("anxiety", 0.1, -0.2, True, "MED",
          _codes("30000 Anxiety state, unspecified", "F419 Anxiety disorder, unspecified"),
          (("LORazepam", 0.88),)),
    Group("hypothyroidism", 0.1, 0.15, True, "MED",
          _codes("2449 Unspecified acquired hypothyroidism", "E039 Hypothyroidism, unspecified"),
          (("Levothyroxine Sodium", 0.97),)),
    Group("iron deficiency", 0.07, 0.05, True, "MED",
          _codes("2809 Iron deficiency anemia, unspecified",
                 "D509 Iron deficiency anemia, unspecified"),
          (("Ferrous Sulfate", 0.93),)),
    Group("cirrhosis", 0.05, -0.1, True, "MED",
          _codes("5715 Cirrhosis of liver without mention of alcohol",
                 "K7460 Unspecified cirrhosis of liver"),
          (("Lactulose", 0.93), ("Rifaximin", 0.85), ("Nadolol", 0.5))),
    Group("epilepsy", 0.05, -0.1, True, "NMED",
          _codes("34590 Epilepsy, unspecified, without mention of intractable epilepsy",
                 "G40909 Epilepsy, unspecified, not intractable, without status epilepticus"),
          (("LevETIRAcetam", 0.93),)),
    Group("osteoporosis", 0.05, 0.5, True, "MED",
          _codes("73300 Osteoporosis, unspecified",
                 "M810 Age-related osteoporosis without current pathological fracture"),
          (("Calcium Carbonate", 0.85), ("Vitamin D", 0.88))),
    Group("prostate", 0.12, 0.4, True, "MED",
          _codes("60000 Hypertrophy (benign) of prostate without urinary obstruction and other "
                 "lower urinary tract symptom (LUTS)",
                 "N400 Benign prostatic hyperplasia without lower urinary tract symptoms"),
          (("Tamsulosin", 0.93), ("Finasteride", 0.5)), "M"),
    Group("gout", 0.06, 0.1, True, "MED",
          _codes("2749 Gout, unspecified", "M109 Gout, unspecified"),
          (("Allopurinol", 0.92), ("Colchicine", 0.45))),
    Group("HIV", 0.02, -0.3, True, "MED",
          _codes("042 Human immunodeficiency virus [HIV] disease",
                 "B20 Human immunodeficiency virus [HIV] disease"),
          (("Emtricitabine-Tenofovir (Truvada)", 0.9), ("Dolutegravir", 0.85),
           ("Sulfameth/Trimethoprim DS", 0.6))),
    Group("Parkinson", 0.03, 0.4, True, "NMED",
          _codes("3320 Paralysis agitans", "G20 Parkinson's disease"),
          (("Carbidopa-Levodopa (25-100)", 0.96),)),
    Group("dementia", 0.03, 0.8, True, "MED",
          _codes("29420 Dementia, unspecified, without behavioral disturbance",
                 "F0390 Unspecified dementia without behavioral disturbance"),
          (("Donepezil", 0.88), ("Memantine", 0.55))),
    Group("bipolar disorder", 0.03, -0.2, True, "PSYCH",
          _codes("29680 Bipolar disorder, unspecified", "F319 Bipolar disorder, unspecified"),
          (("QUEtiapine Fumarate", 0.88), ("Divalproex (DELayed Release)", 0.75))),
    Group("kidney transplant", 0.03, -0.1, True, "SURG",
          _codes("V420 Kidney replaced by transplant", "Z940 Kidney transplant status"),
          (("Tacrolimus", 0.96), ("Mycophenolate Mofetil", 0.92), ("PredniSONE", 0.85))),
    Group("neuropathy", 0.06, 0.1, True, "NMED",
          _codes("3569 Unspecified hereditary and idiopathic peripheral neuropathy",
                 "G629 Polyneuropathy, unspecified"),
          (("Gabapentin", 0.93),)),
    Group("tobacco", 0.1, -0.3, True, "MED",
          _codes("3051 Tobacco use disorder",
                 "F17210 Nicotine dependence, cigarettes, uncomplicated"),
          (("Nicotine Patch", 0.88),)),
    Group("pneumonia", 0.1, 0.1, False, "MED",
          _codes("486 Pneumonia, organism unspecified", "J189 Pneumonia, unspecified organism"),
          (("CefTRIAXone", 0.88), ("Azithromycin", 0.85))),
    Group("sepsis", 0.08, 0.1, False, "MED",
          _codes("0389 Unspecified septicemia", "A419 Sepsis, unspecified organism"),
          (("Vancomycin", 0.96), ("CefePIME", 0.8))),
    Group("urinary infection", 0.09, 0.15, False, "MED",
          _codes("5990 Urinary tract infection, site not specified",
                 "N390 Urinary tract infection, site not specified"),
          (("Ciprofloxacin HCl", 0.9),)),
    Group("acute kidney failure", 0.09, 0.1, False, "MED",
          _codes("5849 Acute kidney failure, unspecified",
                 "N179 Acute kidney failure, unspecified"),
          (("Sodium Bicarbonate", 0.8),)),
    Group("respiratory failure", 0.05, 0.05, False, "MED",
          _codes("51881 Acute respiratory failure",
                 "J9601 Acute respiratory failure with hypoxia"),
          (("Propofol", 0.88), ("Fentanyl Citrate", 0.88),
           ("Chlorhexidine Gluconate 0.12% Oral Rinse", 0.8))),
    Group("alcohol withdrawal", 0.06, -0.4, False, "MED",
          _codes("29181 Alcohol withdrawal",
                 "F10239 Alcohol dependence with withdrawal, unspecified"),
          (("Thiamine", 0.95), ("FoLIC Acid", 0.92), ("Diazepam", 0.85))),
    Group("pulmonary embolism", 0.04, 0.05, False, "MED",
          _codes("41519 Other pulmonary embolism and infarction",
                 "I2699 Other pulmonary embolism without acute cor pulmonale"),
          (("Enoxaparin Sodium", 0.92),)),
    Group("infarction", 0.05, 0.2, False, "CMED",
          _codes("41071 Subendocardial infarction, initial episode of care",
                 "I214 Non-ST elevation (NSTEMI) myocardial infarction"),
          (("Clopidogrel", 0.92), ("Heparin Sodium", 0.88), ("Metoprolol Tartrate", 0.8))),
    Group("clostridium", 0.03, 0.1, False, "MED",
          _codes("00845 Intestinal infection due to Clostridium difficile",
                 "A0472 Enterocolitis due to Clostridium difficile, not specified as recurrent"),
          (("Vancomycin Oral Liquid", 0.92), ("MetRONIDAZOLE (FLagyl)", 0.6))),
    Group("cellulitis", 0.05, 0.0, False, "SURG",
          _codes("6826 Cellulitis and abscess of leg, except foot",
                 "L03116 Cellulitis of left lower limb"),
          (("CefazoLIN", 0.9),)),
    Group("bleeding", 0.05, 0.1, False, "MED",
          _codes("5789 Hemorrhage of gastrointestinal tract, unspecified",
                 "K922 Gastrointestinal hemorrhage, unspecified"),
          (("Pantoprazole", 0.96), ("Octreotide Acetate", 0.4))),
    Group("hypokalemia", 0.1, 0.0, False, "MED",
          _codes("2768 Hypopotassemia", "E876 Hypokalemia"),
          (("Potassium Chloride", 0.96), ("Magnesium Sulfate", 0.75))),
    Group("stroke", 0.04, 0.3, False, "NMED",
          _codes("43491 Cerebral artery occlusion, unspecified with cerebral infarction",
                 "I639 Cerebral infarction, unspecified"),
          (("Labetalol", 0.8), ("Aspirin EC", 0.85))),
    Group("hip fracture", 0.05, 0.4, False, "ORTHO",
          _codes("8208 Closed fracture of unspecified part of neck of femur",
                 "S72001A Fracture of unspecified part of neck of right femur, initial encounter "
                 "for closed fracture"),
          (("HYDROmorphone (Dilaudid)", 0.85), ("OxyCODONE (Immediate Release)", 0.9))),
)  # fmt: skip

STATUS_CODES: tuple[tuple[Code, ...], ...] = (
    _codes("V1582 Personal history of tobacco use",
           "Z87891 Personal history of nicotine dependence"),
    _codes("27651 Dehydration", "E860 Dehydration"),
    _codes("2761 Hyposmolality and/or hyponatremia", "E871 Hypo-osmolality and hyponatremia"),
    _codes("07054 Chronic hepatitis C without mention of hepatic coma",
           "B182 Chronic viral hepatitis C"),
    _codes("V707 Examination of participant in clinical trial",
           "V707 Person on outside of bus injured in collision with pedestrian or animal in "
           "traffic accident"),
    _codes("V5861 Long-term (current) use of anticoagulants",
           "V420 Car driver injured in collision with two- or three-wheeled motor vehicle in "
           "nontraffic accident"),
)  # fmt: skip
"""Codes that imply no drug. V707 and V420 mean other things in the other version: the planted
clash of codes, true of the real code books too."""

STATUS_SHARE = 0.08
"""Probability of each status code on an admission."""

BACKGROUND: tuple[tuple[str, float], ...] = (
    ("Acetaminophen", 0.9),
    ("Docusate Sodium", 0.65),
    ("Senna", 0.6),
    ("Heparin", 0.7),
    ("Ondansetron", 0.4),
    ("Bisacodyl", 0.25),
    ("Polyethylene Glycol", 0.2),
    ("Multivitamins", 0.12),
    ("Influenza Vaccine Quadrivalent", 0.06),
)
"""What many inpatients get, whatever their diagnoses."""

_DRUG_ROWS = """
Acetaminophen|ACET325|325 mg Tablet|TAB|650|mg|PO/NG
Docusate Sodium|DOCU100|100 mg Capsule|CAP|100|mg|PO
Senna|SENN187|8.6 mg Tablet|TAB|1|TAB|PO
Heparin|HEPA5I|5000 Units/mL Vial|mL|5000|UNIT|SC
Ondansetron|ONDAN4I|2 mg/mL-2 mL Vial|VIAL|4|mg|IV
Bisacodyl|BISA5|5 mg Tablet|TAB|10|mg|PO
Polyethylene Glycol|MIRA17|17 g Packet|PKT|17|g|PO
Multivitamins|MULTI|1 Tablet|TAB|1|TAB|PO
Influenza Vaccine Quadrivalent|FLU05S|0.5 mL Syringe|SYR|0.5|mL|IM
Lisinopril|LISI10|10 mg Tablet|TAB|10|mg|PO
AmLODIPine|AMLO5|5 mg Tablet|TAB|5|mg|PO
Atorvastatin|ATOR40|40 mg Tablet|TAB|40|mg|PO
Insulin|INSULIN|100 Units/mL Vial|UNIT|0-12|UNIT|SC
Glucose Gel|GLUC15|15 g Tube|TUBE|15|g|PO
Glucagon|GLUC1I|1 mg Vial|VIAL|1|mg|IM
Aspirin|ASA81|81 mg Tab|TAB|81|mg|PO
Metoprolol Succinate XL|TOPR50|50 mg Tab|TAB|50|mg|PO
Nitroglycerin SL|NTG4S|0.4 mg Tablet|TAB|0.4|mg|SL
Furosemide|FURO40I|10 mg/mL-4 mL Vial|VIAL|40|mg|IV
Carvedilol|CARV6|6.25 mg Tablet|TAB|6.25|mg|PO
Spironolactone|SPIR25|25 mg Tablet|TAB|25|mg|PO
Warfarin|WARF5|5 mg Tablet|TAB|5|mg|PO
Diltiazem|DILT30|30 mg Tablet|TAB|30|mg|PO
Albuterol 0.083% Neb Soln|ALBU083|0.083% Neb|NEB|1|NEB|IH
Ipratropium Bromide Neb|IPRA2H|0.5 mg Neb|NEB|1|NEB|IH
Tiotropium Bromide|TIOT18|18 mcg Capsule|CAP|1|CAP|IH
Albuterol Inhaler|ALBUINH|90 mcg Inhaler|INH|2|PUFF|IH
Fluticasone Propionate 110mcg|FLOV110|110 mcg Inhaler|INH|2|PUFF|IH
Montelukast|MONT10|10 mg Tablet|TAB|10|mg|PO
Calcitriol|CALCI25|0.25 mcg Capsule|CAP|0.25|mcg|PO
Sevelamer CARBONATE|SEVE800|800 mg Tablet|TAB|800|mg|PO
Omeprazole|OMEP20|20 mg Capsule|CAP|20|mg|PO
Sertraline|SERT50|50 mg Tablet|TAB|50|mg|PO
TraZODone|TRAZ50|50 mg Tablet|TAB|50|mg|PO
LORazepam|LORA5|0.5 mg Tablet|TAB|0.5|mg|PO
Levothyroxine Sodium|LEVO50|50 mcg Tablet|TAB|50|mcg|PO
Ferrous Sulfate|FERR325|325 mg Tablet|TAB|325|mg|PO
Lactulose|LACT30L|20 g/30 mL Cup|mL|30|mL|PO
Rifaximin|RIFA550|550 mg Tablet|TAB|550|mg|PO
Nadolol|NADO20|20 mg Tablet|TAB|20|mg|PO
LevETIRAcetam|LEVE500|500 mg Tablet|TAB|500|mg|PO
Calcium Carbonate|CALC500|500 mg Tablet|TAB|500|mg|PO
Vitamin D|VITD1000|1000 Unit Tablet|TAB|1000|UNIT|PO
Tamsulosin|TAMS4|0.4 mg Capsule|CAP|0.4|mg|PO
Finasteride|FINA5|5 mg Tablet|TAB|5|mg|PO
Allopurinol|ALLO100|100 mg Tablet|TAB|100|mg|PO
Colchicine|COLC6|0.6 mg Tablet|TAB|0.6|mg|PO
Emtricitabine-Tenofovir (Truvada)|TRUV|200-300 mg Tablet|TAB|1|TAB|PO
Dolutegravir|DOLU50|50 mg Tablet|TAB|50|mg|PO
Sulfameth/Trimethoprim DS|BACTDS|160-800 mg Tablet|TAB|1|TAB|PO
Carbidopa-Levodopa (25-100)|SINE25|25-100 Tablet|TAB|1|TAB|PO
Donepezil|DONE5|5 mg Tablet|TAB|5|mg|PO
Memantine|MEMA10|10 mg Tablet|TAB|10|mg|PO
QUEtiapine Fumarate|QUET25|25 mg Tablet|TAB|25|mg|PO
Divalproex (DELayed Release)|DIVA250|250 mg Tablet|TAB|500|mg|PO
Tacrolimus|TACR1|1 mg Capsule|CAP|1|mg|PO
Mycophenolate Mofetil|MYCO500|500 mg Tablet|TAB|500|mg|PO
PredniSONE|PRED5|5 mg Tablet|TAB|5|mg|PO
Gabapentin|GABA300|300 mg Capsule|CAP|300|mg|PO
Nicotine Patch|NICO14|14 mg Patch|PTCH|14|mg|TD
CefTRIAXone|CEFT1F|1 g Frozen Bag|BAG|1|g|IV
Azithromycin|AZIT250|250 mg Tablet|TAB|250|mg|PO
Vancomycin|VANC1F|1 g Frozen Bag|BAG|1000|mg|IV
CefePIME|CEFE2I|2 g Vial|VIAL|2|g|IV
Ciprofloxacin HCl|CIPR500|500 mg Tablet|TAB|500|mg|PO
Sodium Bicarbonate|SODB650|650 mg Tablet|TAB|650|mg|PO
Propofol|PROP100I|10 mg/mL-100 mL Vial|VIAL|20-50|mcg/kg/min|IV DRIP
Fentanyl Citrate|FENT2I|50 mcg/mL-2 mL Amp|AMP|25-100|mcg|IV
Chlorhexidine Gluconate 0.12% Oral Rinse|CHLO15L|0.12% Cup|mL|15|mL|ORAL
Thiamine|THIA100|100 mg Tablet|TAB|100|mg|PO
FoLIC Acid|FOLA1|1 mg Tablet|TAB|1|mg|PO
Diazepam|DIAZ5|5 mg Tablet|TAB|10|mg|PO
Enoxaparin Sodium|ENOX80I|80 mg/0.8 mL Syringe|SYR|80|mg|SC
Clopidogrel|CLOP75|75 mg Tablet|TAB|75|mg|PO
Heparin Sodium|HEPBASE|25,000 unit Premix Bag|BAG|25000|UNIT|IV DRIP
Metoprolol Tartrate|METO25|25 mg Tablet|TAB|25|mg|PO
Vancomycin Oral Liquid|VANCOL|125 mg/2.5 mL Syringe|SYR|125|mg|PO
MetRONIDAZOLE (FLagyl)|METR500|500 mg Tablet|TAB|500|mg|PO
CefazoLIN|CEFA2F|2 g Frozen Bag|BAG|2|g|IV
Pantoprazole|PANT40I|40 mg Vial|VIAL|40|mg|IV
Octreotide Acetate|OCTR500I|500 mcg/mL Vial|VIAL|50|mcg/hr|IV DRIP
Potassium Chloride|KCL20P|20 mEq Packet|PKT|40|mEq|PO
Magnesium Sulfate|MAG2PM|2 g/50 mL Premix Bag|BAG|2|gm|IV
Labetalol|LABE100|100 mg Tablet|TAB|100|mg|PO
Aspirin EC|ASAEC325|325 mg Tablet|TAB|325|mg|PO
HYDROmorphone (Dilaudid)|HYDR2I|2 mg/mL Syringe|SYR|0.5-1|mg|IV
OxyCODONE (Immediate Release)|OXYC5|5 mg Tablet|TAB|5|mg|PO
"""

DRUGS: dict[str, Drug] = {
    drug.name: drug for drug in (Drug(*row.split("|")) for row in _DRUG_ROWS.strip().split("\n"))
}

FLUSHES: tuple[Drug, ...] = (
    Drug("Sodium Chloride 0.9%  Flush", "NACLFLUSH", "10 mL Syringe", "SYR", "3", "mL", "IV"),
    Drug("Heparin Flush (10 units/ml)", "HEPA10SYR", "10 Units/mL - 5 mL Syringe", "SYR", "5",
         "mL", "IV"),
)  # fmt: skip
VEHICLES: tuple[Drug, ...] = (
    Drug("Bag", "BAG", "Bag", "BAG", "1", "BAG", "IV"),
    Drug("5% Dextrose", "D5W250", "250 mL Bag", "mL", "250", "mL", "IV"),
    Drug("0.9% Sodium Chloride", "NS100", "100 mL Bag", "mL", "100", "mL", "IV"),
    Drug("SW", "SW", "Vial", "mL", "20", "mL", "IV"),
)
ADDITIVES: tuple[Drug, ...] = (
    Drug("Multivitamin IV", "MVI10I", "10 mL Vial", "mL", "10", "mL", "IV"),
    Drug("Thiamine", "THIA100I", "100 mg/mL Vial", "mL", "100", "mg", "IV"),
)

ADMISSION_TYPES: dict[str, float] = {
    "EW EMER.": 0.5,
    "OBSERVATION ADMIT": 0.2,
    "URGENT": 0.15,
    "SURGICAL SAME DAY ADMISSION": 0.1,
    "ELECTIVE": 0.05,
}
INSURANCES: dict[str, float] = {"Other": 0.5, "Medicare": 0.4, "Medicaid": 0.1}
ANCHOR_YEAR_GROUPS: tuple[str, ...] = ("2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019")
WARDS: dict[str, str] = {
    "MED": "Medicine",
    "CMED": "Medicine/Cardiology",
    "NMED": "Neurology",
    "SURG": "Med/Surg",
    "ORTHO": "Surgery/Trauma",
    "PSYCH": "Psychiatry",
}
INTENSIVE_CARE_UNITS: dict[str, str] = {
    "MED": "Medical Intensive Care Unit (MICU)",
    "CMED": "Coronary Care Unit (CCU)",
    "NMED": "Neuro Surgical Intensive Care Unit (Neuro SICU)",
    "SURG": "Surgical Intensive Care Unit (SICU)",
    "ORTHO": "Trauma SICU (TSICU)",
    "PSYCH": "Medical Intensive Care Unit (MICU)",
}
