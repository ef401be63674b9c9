"""What the processes of a simulation do not import: each would pay for it with seconds of a core."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

HEAVY = {"torch", "transformers", "sklearn", "scipy", "pandas", "polars", "matplotlib", "opacus"}


def imported(code):
    """Return what of the heavy libraries a fresh interpreter has imported after some code."""
    tell = f"import sys, json; print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tell}"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("app", ["server.app", "client.app"])
def test_flower_s_process_imports_the_apps_alone(app):
    assert imported(f"import {app}") == []
