"""Packages that only some options need: said in one line where one is missing."""

import importlib.metadata
import importlib.util

from packaging.requirements import Requirement

from common.errors import UserError


def require_extra(module: str, package: str, *, needed_by: str, without: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: What is imported of it.
        package: Its name in the package index.
        needed_by: The option that needs it, as a person set it.
        without: How to do without.

    Raises:
        UserError: if it is not; the fix names the package and the versions that FedRx works with.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{needed_by} needs the package {package}",
            fix=f"pip install '{requirement(package)}', or {without}",
        )


def requirement(package: str) -> str:
    """Return an optional package with the range that FedRx declares, as pip reads it.

    >>> requirement("llguidance").startswith("llguidance<")
    True
    """
    declared = map(Requirement, importlib.metadata.requires("fedrx") or ())
    ranges = [str(one.specifier) for one in declared if one.name == package]
    return f"{package}{ranges[0] if ranges else ''}"
