"""MIMIC-IV as a data source: the open demo, synthetic tables, and (whenever in doubt) credentialed.

The tag rests on content: every table in use must have a known sha256. A manifest alone proves
nothing: the hashes in it must be those of the tables.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from common.config import DataConfig
from common.data.handling import CREDENTIALED, DEMO, SYNTHETIC
from common.data.icd import Diagnosis
from common.data.mimic.admissions import prepare_tables
from common.data.mimic.tables import find_tables
from common.data.protocols import PROTOCOLS
from common.data.samples import Prepared, Progress
from common.data.source import Source
from common.data.synthetic.write import MANIFEST_NAME
from common.data.tables import read

_DEMO_SUMS = """
59dcc6cd8450ddf03ad32cc7d76e41caa4c9633541715987f590c74835cf6fae  patients.csv.gz
d6f7f45cad83a977cfe40cf80572ad13df3970071c5f91bf2fd319c3903516f0  patients.csv
910b9f160ffdf1e08ea673585393f347c773ccc87d66875c627584a903ae8493  admissions.csv.gz
b08247c945ce0c69c505cf3427c6442135b89d9ea6315a89d4adb7b1733ce1d4  admissions.csv
958565670c0b3903c0c12825366dc2bae8561d2d55f16feac0c949dd630ed3e4  diagnoses_icd.csv.gz
ffb493244933ae7e1cbb17183f78a2e65625bd253489c01d376bfdc49df774af  diagnoses_icd.csv
0f715a3c4c5e44400305d4deb86ff648e499a3bfcb946f353e8b030022d3ec06  d_icd_diagnoses.csv.gz
e1eaafe3916f25cb2162dc95c31c280d834434531afa3a91b40bdf9943e58d2b  d_icd_diagnoses.csv
33c392ba5b9299b08eca0a61911ba106f0aebdba26ed31b856bb9ffd49fe3654  prescriptions.csv.gz
3865f9f13bec8bdfa6eca6205d26d1a55c40051a5c7d396609a68e532775db9d  prescriptions.csv
6d7c69dbb2c79b9d1de7d1e68f3424ad248821d7c074dc6537d7290774af39b9  omr.csv.gz
64a75e495f3c85b16981c94fe72c4818f8dd67eeff534604a12d5f974c9c938f  omr.csv
28306d68e952fe2cc9ef6e60b0afda93c27d7a06bee8ef39e71ccc4de5ded793  services.csv.gz
78d0093c8829fa86dd1c1895128e62615d0da15a8faa4123f0ecfe00213dfcc7  services.csv
41151539886d12d57159b65ffe4d7df5a7ef8ceb7cd113ea9a56fbfbfd78a87c  transfers.csv.gz
75a8f8c8bcaecb57406bbec43aa1cffee72cf2b91195a949aa7f21426432da8b  transfers.csv
68f21dcba9ae0c4b7faa3ef38aa950a8ebeb6d167bc74416314dccdcf28674e0  procedures_icd.csv.gz
03161547a84ac86657f27c4fedd5d5f1e1b391b29e3faa53a6e6171e141b9fb6  procedures_icd.csv
a921a20fbf3220e2a7fe874d6392d671c1cc769a001ef0a7841b80eb01030bb6  d_icd_procedures.csv.gz
ce5e256bc06ff8e2071e190799fe3bb99bd58be4d66d6b81276d61bfe9f65688  d_icd_procedures.csv
d51a4cf1ea63245abe7d544b0d50a928e9ee2ec5eb9a5ce85500aed0bd6c6dfc  labevents.csv.gz
f3feb488a9b7c6039e47a30d4f0ff9cd869fedf0e02df6c250d7405c0db1a8d9  labevents.csv
72ea5f020469fd24543bd98ab3bd0a4f645a5a4b7802d9d52af20d736f9d76db  d_labitems.csv.gz
6a758494be345531d17ff3f2efcb0fefad78e7bfce83a4168f4ab5132e148856  d_labitems.csv
"""
DEMO_SHA256 = {file: digest for digest, file in map(str.split, _DEMO_SUMS.split("\n")[1:-1])}
"""Files of the MIMIC-IV Clinical Database Demo 2.2 (Johnson et al., PhysioNet): sha256 of the
csv.gz, as in its SHA256SUMS.txt, and of the csv inside."""


class MimicIV(Source):
    """A folder that holds ``hosp/``."""

    identifiers = r"[1-3]\d{7}"  # patients (1...), admissions (2...), stays (3...)
    protocols = PROTOCOLS

    def claims(self, path: str) -> bool:
        """Take whatever folder nobody else claims: its errors say what is missing."""
        return (Path(path).expanduser() / "hosp").is_dir()

    def files(self, folder: Path, config: DataConfig) -> dict[str, Path]:
        """Return the tables in use."""
        tables = find_tables(folder, config.protocol)
        return {table.label: table.path for table in tables.values()}

    def tag(self, folder: Path, hashes: Mapping[str, str]) -> str:
        """Return ``demo``, ``synthetic`` or ``credentialed``."""
        if all(DEMO_SHA256.get(Path(label).name) == digest for label, digest in hashes.items()):
            return DEMO
        recorded = _manifest_hashes(folder)
        if all(recorded.get(label) == digest for label, digest in hashes.items()):
            return SYNTHETIC
        return CREDENTIALED

    def read(self, folder: Path, config: DataConfig, *, progress: Progress) -> Prepared:
        """Read, clean and join the tables."""
        return prepare_tables(
            folder,
            drop_flushes=config.drop_flushes,
            progress=progress,
            protocol=config.protocol,
        )

    def titles(self, folder: Path, config: DataConfig) -> list[Diagnosis]:
        """Return all titles of d_icd_diagnoses."""
        del config
        frame = read(find_tables(folder)["d_icd_diagnoses"]).drop_nulls()
        rows = zip(frame["icd_code"], frame["icd_version"], frame["long_title"], strict=True)
        return [
            Diagnosis(title=" ".join(title.split()), code=f"{version.strip()}:{code.strip()}")
            for code, version, title in rows
        ]


def _manifest_hashes(folder: Path) -> dict[str, str]:
    """Read the generator's record of its files; empty when there is none in its form."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        return {label: str(entry["sha256"]) for label, entry in manifest["tables"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
