"""What follows from ``common.config``: Flower's defaults in pyproject.toml, the page of keys.

python -m sim.flower.run_config      # in the repository's root
"""

import sys
from pathlib import Path

from common.config import Config
from common.configio import allowed, flatten, known_keys, toml_scalar
from common.files import utf8

HEADER = "[tool.flwr.app.config]"
PAGE_HEAD = """\
# Every configuration key

Written by `python -m sim.flower.run_config`; a test holds it. The same keys stand in TOML files
(`[train]`, `learning-rate`), on the command line (`--set train.learning-rate=0.01`) and in Flower's
run configuration.

| file | for |
|---|---|
| `demo.toml`, `demo-tiny.toml` | `fedrx demo`, and the same in a minute |
| `hospitals.toml` | three hospitals on your tables |
| `hospitals-dp.toml` | the same, every patient protected |
| `paper.toml` | the paper's single-node run |
"""


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
    lines, defaults = [PAGE_HEAD], flatten(Config())
    section = ""
    for key, entry in known_keys().items():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append(
                f"\n## [{section}]\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n"
            )
        bounds = allowed(entry).replace(" | ", ", ")
        default = toml_scalar(defaults[key])
        lines.append(f"| `{key}` | `{default}` | {bounds} | {entry.metadata['meaning']} |\n")
    return "".join(lines)


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    write_defaults(root / "pyproject.toml")
    (root / "configs" / "README.md").write_bytes(utf8(keys_page()))
