"""MEDS as a data source. Its data is credentialed: nothing in a data set proves the contrary."""

from pathlib import Path

from common.config import DataConfig
from common.data.icd import Diagnosis
from common.data.meds.codes import EICU, Codes, read_codes
from common.data.meds.eicu import prepare_stays
from common.data.meds.events import extraction_of, find_shards, read_titles
from common.data.meds.read import prepare_events
from common.data.protocols import ADMISSION, PROTOCOLS
from common.data.samples import Prepared, Progress
from common.data.source import Source
from common.errors import UserError


class Meds(Source):
    """A folder that holds ``data/**/*.parquet`` and ``metadata/``."""

    protocols = PROTOCOLS

    def claims(self, path: str) -> bool:
        """Take a folder with ``metadata/``, or with parquet files in it or in its ``data/``."""
        folder = Path(path).expanduser()
        if not folder.is_dir() or (folder / "hosp").is_dir():
            return False
        if (folder / "metadata").is_dir() or any(folder.glob("*.parquet")):
            return True
        return next((folder / "data").rglob("*.parquet"), None) is not None

    def files(self, folder: Path, config: DataConfig) -> dict[str, Path]:
        """Return the shards, the table of codes, and the file that says what codes mean."""
        read_codes(config.meds_codes)
        files = find_shards(folder)
        if config.meds_codes:
            files["data.meds-codes"] = Path(config.meds_codes).expanduser()
        return files

    def read(self, folder: Path, config: DataConfig, *, progress: Progress) -> Prepared:
        """Read, clean and join the events."""
        codes = _codes(folder, config)
        if codes.extraction == EICU.extraction:
            if config.protocol != ADMISSION:
                raise UserError(
                    f"data.protocol={config.protocol} with eICU as MEDS, whose subjects are "
                    "single stays",
                    allowed=ADMISSION,
                    fix="leave data.protocol out",
                )
            return prepare_stays(folder, codes, drop_flushes=config.drop_flushes, progress=progress)
        return prepare_events(
            folder,
            codes,
            drop_flushes=config.drop_flushes,
            progress=progress,
            protocol=config.protocol,
        )

    def titles(self, folder: Path, config: DataConfig) -> list[Diagnosis]:
        """Return the descriptions of all codes of diagnoses; eICU's words stand in the samples."""
        codes = _codes(folder, config)
        if codes.extraction == EICU.extraction:
            return []
        return [
            Diagnosis(title=title, code=f"{version}:{code}")
            for version, code, title in read_titles(folder, codes).iter_rows()
        ]


def _codes(folder: Path, config: DataConfig) -> Codes:
    """Return what the user's file says; without one the codes of the extraction by its columns."""
    return read_codes(config.meds_codes, otherwise=extraction_of(folder))
