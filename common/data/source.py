"""The seam of data sources: what a source answers, whoever wrote its tables."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from common.config import DataConfig
from common.data.handling import CREDENTIALED
from common.data.icd import Diagnosis
from common.data.protocols import ADMISSION
from common.data.samples import Prepared, Progress
from common.data.tables import reading


class Source(ABC):
    """One kind of data: how it is recognised and read. ``common.data.sources`` lists all.

    A source hands over samples in columns (``common.data.cleaning.assemble`` makes them of its
    tables, and counts every row that is left out), a tag, by which ``common.data.handling`` says
    what may leave the machine, and titles of diagnoses to search in.
    """

    identifiers: ClassVar[str] = r"\d{6,}"
    """A regular expression: how patients and stays are numbered. Texts for others hold none."""
    protocols: tuple[str, ...] = (ADMISSION,)
    """Of ``data.protocol``: what its tables can serve."""
    kind: str = "such data"
    """What a refusal calls it, with the reason why it serves no other protocol."""

    @abstractmethod
    def claims(self, path: str) -> bool:
        """Tell whether ``data.path`` is of this kind."""

    def folder(self, config: DataConfig, cache: Path) -> Path:
        """Return the folder of the data; a source that makes its own puts it into the cache."""
        del cache
        return Path(config.path).expanduser().absolute()

    @abstractmethod
    def files(self, folder: Path, config: DataConfig) -> dict[str, Path]:
        """Return every file that samples depend on, by its path below the folder.

        Raises:
            UserError: One that is needed is missing or is no such file.
        """

    def tag(self, folder: Path, hashes: Mapping[str, str]) -> str:
        """Return the tag by content alone; whatever is not recognised is credentialed.

        Args:
            folder: Of the data.
            hashes: sha256 of ``files``, by the same names.
        """
        del folder, hashes
        return CREDENTIALED

    @abstractmethod
    def read(self, folder: Path, config: DataConfig, *, progress: Progress) -> Prepared:
        """Read and clean the tables.

        Raises:
            UserError: Tables that cannot be used as they are.
        """

    def titles(self, folder: Path, config: DataConfig) -> list[Diagnosis]:
        """Return the diagnoses that the source has a title for, beyond those of its samples."""
        del folder, config
        return []


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the sha256 of every file, by name.

    Raises:
        UserError: A file that cannot be read.
    """
    hashes = {}
    for label, path in files.items():
        with reading(label), path.open("rb") as stream:
            hashes[label] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
