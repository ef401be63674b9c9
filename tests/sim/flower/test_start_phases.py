"""Which phase of its start a simulation is in, by the files that appear meanwhile."""

from line_fixtures import wire_line

from common.config import Config
from common.rundir import RunDirectory
from common.undocumented.ray_names import RAYLET
from sim.flower.start_phases import BACKBONE, FIRST_LOSS, HANDSHAKE, RAY, phases_of


def test_each_file_that_appears_is_a_phase_further(tmp_path):
    run = RunDirectory.create(Config(), directory=tmp_path / "run")
    run.append("wire.jsonl", wire_line(kind="train"))  # of an earlier attempt
    folder, seen = tmp_path / "work", []
    phase = phases_of(folder, run)
    seen.append(phase())
    (folder / RAYLET).parent.mkdir(parents=True)
    (folder / RAYLET).touch()
    seen.append(phase())
    run.append("wire.jsonl", wire_line(kind="query"))
    seen.append(phase())
    run.write_json("workers/123.json", {"backbone_loads": 1})
    seen.append(phase())
    run.append("wire.jsonl", wire_line(kind="evaluate"))
    seen.append(phase())
    run.append("wire.jsonl", wire_line(kind="train"))
    seen.append(phase())
    (run.path / "wire.jsonl").unlink()
    seen.append(phase())
    assert seen == [RAY, BACKBONE, BACKBONE, HANDSHAKE, FIRST_LOSS, "", ""]
