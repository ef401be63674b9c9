"""Print pyproject.toml's requirements as pip reads them: ``oldest`` or ``newest`` of each range.

``oldest`` pins each to its lowest version, ``newest`` drops the upper bounds. What other packages
require is left to pip, so the newest is what those allow.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


def ranged(text: str, end: str) -> str:
    """Return a requirement moved to one end of its range.

    Args:
        text: As pyproject.toml has it.
        end: ``oldest`` or ``newest``.
    """
    requirement = Requirement(text)
    lowest = [one.version for one in requirement.specifier if one.operator == ">="]
    if lowest:
        sign = "==" if end == "oldest" else ">="
        requirement.specifier = SpecifierSet(sign + lowest[0])
    return str(requirement)


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    sys.stdout.writelines(f"{ranged(line, sys.argv[1])}\n" for line in listed)
