"""The built-in source: synthetic tables, written into the cache when they are asked for."""

from pathlib import Path

from common.config import DataConfig
from common.data.cache import cache_key, writing
from common.data.icd import Diagnosis
from common.data.mimic.source import MimicIV
from common.data.synthetic.write import write_tables
from common.files import new_folder

PATH = "synthetic"
"""What ``data.path`` says in place of a folder."""


class Synthetic(MimicIV):
    """Tables of MIMIC-IV's form about patients who never lived."""

    def claims(self, path: str) -> bool:
        """Take the one name that is no folder."""
        return path == PATH

    def folder(self, config: DataConfig, cache: Path) -> Path:
        """Write the tables, unless they are in the cache."""
        key = cache_key({"patients": config.synthetic_patients, "seed": config.synthetic_seed})
        folder = cache / "synthetic" / key
        if not folder.is_dir():
            with writing(folder.parent), new_folder(folder) as written:
                write_tables(
                    written, patients=config.synthetic_patients, seed=config.synthetic_seed
                )
        return folder

    def titles(self, folder: Path, config: DataConfig) -> list[Diagnosis]:
        """Return none: every title of the catalogue is in some sample, and there is no folder."""
        del folder, config
        return []
