"""What follows from ``common.config``: Flower's defaults in pyproject.toml, the page of keys.

python -m sim.flower.run_config      # in the repository's root
"""

import sys
from pathlib import Path

from common.config import Config
from common.configio import allowed, flatten, known_keys, toml_scalar
from common.files import utf8
from sim.pages.fill import fill

HEADER = "[tool.flwr.app.config]"


def flower_defaults() -> str:
    """Return the lines that belong under ``[tool.flwr.app.config]``."""
    return "".join(f"{key} = {toml_scalar(value)}\n" for key, value in flatten(Config()).items())


def write_defaults(pyproject: Path) -> None:
    """Replace the section's lines in ``pyproject`` (everything up to the next section)."""
    before, _, after = pyproject.read_text(encoding="utf-8").partition(HEADER + "\n")
    rest = after.partition("\n[")
    comment = "# written by: python -m sim.flower.run_config\n"
    text = f"{before}{HEADER}\n{comment}{flower_defaults()}{rest[1]}{rest[2]}"
    pyproject.write_bytes(utf8(text))


def keys_page() -> str:
    """Return configs/README.md: every key with its default, what is allowed and its meaning."""
    keys = [
        (key, toml_scalar(flatten(Config())[key]), allowed(entry).replace(" | ", ", "), entry)
        for key, entry in known_keys().items()
    ]
    return fill("configs.md.jinja", keys=keys)


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    write_defaults(root / "pyproject.toml")
    (root / "configs" / "README.md").write_bytes(utf8(keys_page()))
