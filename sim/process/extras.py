"""Packages that only some options need: said in one line where one is missing."""

import importlib.util

from common.errors import UserError
from common.provenance import pip_install

OPTIONAL = {
    "llguidance": "llguidance",
    "bitsandbytes": "bitsandbytes",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow-skinny",
    "fhir": "fhir.resources",
    "submitit": "submitit",
    "rocrate": "rocrate",
}
"""What is imported of each, and the package that brings it."""


def absent(module: str) -> bool:
    """Tell whether a package is not installed."""
    return importlib.util.find_spec(module) is None


def require_extra(module: str, *, needed_by: str, without: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: A key of ``OPTIONAL``.
        needed_by: The option that needs it, as a person set it.
        without: How to do without.

    Raises:
        UserError: if it is not; the fix names the package and the versions that FedRx works with.
    """
    if absent(module):
        package = OPTIONAL[module]
        raise UserError(
            f"{needed_by} needs the package {package}",
            fix=f"{pip_install(package)}, or {without}",
        )
