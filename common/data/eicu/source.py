"""eICU as a data source. Its data is credentialed, and its hospitals are real ones."""

from pathlib import Path

from common.config import DataConfig
from common.data.eicu.read import prepare_tables
from common.data.eicu.tables import find_tables
from common.data.samples import Prepared, Progress
from common.data.source import Source
from common.data.tables import find_csv


class EICU(Source):
    """A folder that holds patient.csv.gz, diagnosis.csv.gz and medication.csv.gz.

    eICU has no dictionary of diagnoses: its words stand in the samples.
    """

    kind = (
        "eICU's tables, which tell neither which of a year's stays came first nor what was known "
        "before the unit"
    )

    identifiers = r"\d{3}-\d{1,6}|\d{6,7}"  # uniquepid; hospital and unit stays

    def claims(self, path: str) -> bool:
        """Take a folder with a table that only eICU has."""
        folder = Path(path).expanduser()
        return any(find_csv(folder, name) for name in ("patient", "medication", "diagnosis"))

    def files(self, folder: Path, config: DataConfig) -> dict[str, Path]:
        """Return the tables in use."""
        del config
        return {table.label: table.path for table in find_tables(folder).values()}

    def read(self, folder: Path, config: DataConfig, *, progress: Progress) -> Prepared:
        """Read, clean and join the tables."""
        return prepare_tables(folder, drop_flushes=config.drop_flushes, progress=progress)
