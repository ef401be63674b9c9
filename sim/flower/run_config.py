"""Keep Flower's run-config defaults in pyproject.toml in step with ``common.config``."""

import sys
from pathlib import Path

from common.config import Config
from common.configio import flatten, toml_scalar

HEADER = "[tool.flwr.app.config]"


def flower_defaults() -> str:
    """Return the lines that belong under ``[tool.flwr.app.config]``."""
    return "".join(f"{key} = {toml_scalar(value)}\n" for key, value in flatten(Config()).items())


def write_defaults(pyproject: Path) -> None:
    """Replace the section's lines in ``pyproject`` (everything up to the next section)."""
    before, _, after = pyproject.read_text(encoding="utf-8").partition(HEADER + "\n")
    rest = after.partition("\n[")
    comment = "# written by: python -m sim.flower.run_config\n"
    pyproject.write_text(
        f"{before}{HEADER}\n{comment}{flower_defaults()}{rest[1]}{rest[2]}", encoding="utf-8"
    )


if __name__ == "__main__":
    write_defaults(Path(sys.argv[1] if len(sys.argv) > 1 else "pyproject.toml"))
