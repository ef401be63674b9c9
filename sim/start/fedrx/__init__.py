"""The command ``fedrx``, under a name that is nobody else's: it finds our packages by location.

``client``, ``common``, ``server`` and ``sim`` are names that other projects use too, and one of
those may come first on the path (PYTHONPATH, a working directory). So the console script does not
import them by the path: it knows where they lie, beside or above this file.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

PACKAGES = ("client", "common", "server", "sim")


class OurPackages(MetaPathFinder):
    """Finds the four packages in one folder, whatever the path says; nothing else.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the packages themselves; what is inside them follows their own path."""
        if path is None and fullname in PACKAGES:
            return PathFinder.find_spec(fullname, [str(self._root)])
        return None


def location() -> Path:
    """Return the folder that holds our packages: installed beside this one, or a checkout."""
    here = Path(__file__).resolve()
    return next(folder for folder in here.parents if (folder / "sim" / "__init__.py").is_file())


def foreign(root: Path) -> str:
    """Return what is wrong if another package of one of the names is imported already, or empty."""
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is None:
            continue
        places = [Path(place) for place in getattr(module, "__path__", ())]
        file = getattr(module, "__file__", None)
        place = places[0] if places else Path(file or name)
        if place.resolve() != (root / name).resolve():
            return (
                f"another package `{name}` is imported before FedRx's own; fix: remove "
                f"{place.parent} from PYTHONPATH, or the .pth file that names it"
            )
    return ""


def main() -> None:
    """Run the command line with our own packages."""
    root = location()
    problem = foreign(root)
    if problem:
        sys.stderr.write(f"fedrx: {problem}\n")
        sys.exit(2)
    sys.meta_path.insert(0, OurPackages(root))
    from common.quick_imports import quick_imports

    with quick_imports():
        from sim.cli.main import main as command

    command()
