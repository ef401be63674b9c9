"""What `fedrx audit` catches: broken variants of the product's own code, each in a process.

    OMP_NUM_THREADS=1 python benchmarks/audit_power.py [--sound 100] [--out FILE]
    python benchmarks/audit_power.py --mutant "clip off" --setting shipped --sound 0

Every mutant patches the code that a hospital runs and then starts the audit as a user would, on
the tiny backbone, at the shipped configuration (configs/hospitals-dp.toml) and with a noise
multiplier of 1. A mutant is caught if the audit refutes the claim; the table says by which
findings. A sound mechanism has to pass every time.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from client import private_update
from common.configio import read_config
from common.errors import RunFailed
from common.privacy import audit as bare_audit
from common.privacy.budget.ledger import Ledger
from common.privacy.mechanism import clipping, gradients
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.mechanism.release import GaussianMechanism
from common.privacy.mechanism.sampling import Units
from common.privacy.settings import with_calibrated_noise
from common.seeds import stream
from common.text.batches import pack
from common.training.gradients import StepLoss, add_unit_gradients
from sim.checks.audit import audit

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "hospitals-dp.toml"
TINY = ("model.backbone=tiny", "train.dtype=fp32", "train.device=cpu")
SETTINGS = {
    "shipped": TINY,
    "sigma 1": (*TINY, "privacy.target-epsilon=0", "privacy.noise-multiplier=1.0"),
}
Patch = Callable[[Any, str, Any], None]


def noise_halved(patch: Patch) -> None:
    """Half of the noise."""
    honest = NoiseSource.gaussian
    patch(NoiseSource, "gaussian", lambda self, n, std: honest(self, n, std) // 2)


def noise_reused(patch: Patch) -> None:
    """The first draw of noise in every step, round and run."""
    honest, kept = NoiseSource.gaussian, {}

    def again(self: NoiseSource, n: int, std: float) -> Any:
        return kept.setdefault((n, std), honest(self, n, std)).copy()

    patch(NoiseSource, "gaussian", again)


def clip_off(patch: Patch) -> None:
    """No clipping."""

    def bare(rows_UP: torch.Tensor, clip_norm: float) -> torch.Tensor:
        return rows_UP.float().sum(0)

    patch(clipping, "clipped_sum", bare)
    patch(gradients, "clipped_sum", bare)
    defaults = {**bare_audit.one_run_audit.__kwdefaults__, "clip": bare}
    patch(bare_audit.one_run_audit, "__kwdefaults__", defaults)


def clip_per_admission(patch: Patch) -> None:
    """Every admission clipped on its own, then added."""

    def each(self: PrivateGradient, session: Any, drawn: Any, *, step: int = 0) -> torch.Tensor:
        sum_P = torch.zeros_like(session.adapter.flat)
        for index in (index for members in drawn for index in members):
            row_1P = torch.zeros(1, len(sum_P))
            add_unit_gradients(session, pack([self.dataset[index]]), [0], row_1P)
            sum_P += clipping.clipped_sum(row_1P, self.plan.clip_norm)
        return sum_P

    patch(PrivateGradient, "clipped_sum", each)


def admissions_added(patch: Patch) -> None:
    """The sum of a patient's admissions in place of their mean, then one clip."""

    def added(self: PrivateGradient, session: Any, drawn: Any, *, step: int = 0) -> torch.Tensor:
        sum_P = torch.zeros_like(session.adapter.flat)
        for members in drawn:
            row_1P = torch.zeros(1, len(sum_P))
            records = [self.dataset[index] for index in members]
            add_unit_gradients(session, pack(records), [0] * len(records), row_1P)
            sum_P += clipping.clipped_sum(row_1P, self.plan.clip_norm)
        return sum_P

    patch(PrivateGradient, "clipped_sum", added)


def sampling_fixed(patch: Patch) -> None:
    """One draw for all steps of a round."""
    honest = Units.draw

    def once(self: Units, plan: Any, noise: Any) -> Any:
        if "kept" not in self.__dict__:
            object.__setattr__(self, "kept", honest(self, plan, noise))
        return self.__dict__["kept"]

    patch(Units, "draw", once)


def sampling_known(patch: Patch) -> None:
    """Draws from the experiment's seed."""
    drawn: Counter[int] = Counter()

    def public(self: Units, plan: Any, noise: Any) -> Any:
        drawn[id(self)] += 1
        generator = stream(0, "poisson", drawn[id(self)])
        chosen = generator.random(len(self.members)) < plan.sampling_rate
        return [self.members[place] for place in np.flatnonzero(chosen)]

    patch(Units, "draw", public)


def rate_too_high(patch: Patch) -> None:
    """A sampling rate 1.2 times the plan's."""

    def more(self: Units, plan: Any, noise: Any) -> Any:
        chosen = noise.bernoulli(len(self.members), min(1.0, 1.2 * plan.sampling_rate))
        return [self.members[place] for place in np.flatnonzero(chosen)]

    patch(Units, "draw", more)


def wrong_divisor(patch: Patch) -> None:
    """The number of patients drawn in place of the public D."""

    def call(self: PrivateGradient, session: Any, step: int) -> StepLoss:
        drawn = self.units.draw(self.plan, self.noise)
        sum_P = self.clipped_sum(session, drawn) * (self.plan.expected_batch / max(1, len(drawn)))
        session.adapter.flat_grad.copy_(self.mechanism_for(session).release(sum_P))
        return StepLoss(None, 0, 0)

    patch(PrivateGradient, "__call__", call)


def noised_twice(patch: Patch) -> None:
    """Noise on a micro-batch as well as on the whole."""
    honest = PrivateGradient.clipped_sum

    def twice(self: PrivateGradient, session: Any, drawn: Any, *, step: int = 0) -> torch.Tensor:
        sum_P = honest(self, session, drawn, step=step)
        mechanism = self.mechanism_for(session)
        return sum_P + mechanism.release(torch.zeros_like(sum_P)) * self.plan.expected_batch

    patch(PrivateGradient, "clipped_sum", twice)


def empty_without_noise(patch: Patch) -> None:
    """Nothing is released for an empty draw: no noise either."""

    def call(self: PrivateGradient, session: Any, step: int) -> StepLoss:
        if len(self.units) and (drawn := self.units.draw(self.plan, self.noise)):
            sum_P = self.clipped_sum(session, drawn)
            session.adapter.flat_grad.copy_(self.mechanism_for(session).release(sum_P))
        else:
            session.adapter.flat_grad.zero_()
        return StepLoss(None, 0, 0)

    patch(PrivateGradient, "__call__", call)


def ledger_short(patch: Patch) -> None:
    """The last round is charged one step too few."""
    honest = Ledger.charge

    def short(self: Ledger, round_number: int, steps: int) -> int:
        last = self.taken + steps == self.plan.steps
        return honest(self, round_number, steps - last)

    patch(Ledger, "charge", short)


def passes_shared(patch: Patch) -> None:
    """Patients share passes that mix them, in bf16 too."""
    honest = gradients.add_unit_gradients
    patch(
        gradients, "add_unit_gradients", lambda *arguments, apart: honest(*arguments, apart=False)
    )


def sum_sent_along(patch: Patch) -> None:
    """A hundredth of the last clipped mean, without noise, added to what is sent."""
    release, update, last = GaussianMechanism.release, private_update.update, {}

    def seen(self: GaussianMechanism, sum_P: torch.Tensor) -> torch.Tensor:
        last["mean_P"] = sum_P.float() / self.plan.expected_batch
        return release(self, sum_P)

    def more(task: Any, source: Any) -> Any:
        result = update(task, source)
        flat_P = np.concatenate([value.ravel() for value in result.b.values()])
        flat_P = flat_P + 0.01 * last["mean_P"].cpu().numpy()
        edges = np.cumsum([value.size for value in result.b.values()])[:-1]
        parts = zip(result.b.items(), np.split(flat_P, edges), strict=True)
        b = {key: part.reshape(value.shape) for (key, value), part in parts}
        return replace(result, b=b)

    patch(GaussianMechanism, "release", seen)
    patch(private_update, "update", more)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "noise halved": noise_halved,
    "noise reused": noise_reused,
    "clip off": clip_off,
    "clip per admission": clip_per_admission,
    "admissions added": admissions_added,
    "sampling fixed": sampling_fixed,
    "sampling known to the server": sampling_known,
    "rate x 1.2": rate_too_high,
    "wrong divisor": wrong_divisor,
    "micro-batch noised twice": noised_twice,
    "empty draw without noise": empty_without_noise,
    "ledger one step short": ledger_short,
    "bf16 passes shared": passes_shared,
    "clipped sum sent along": sum_sent_along,
}
BF16 = ("bf16 passes shared",)
"""What is no mutant in fp32."""


def audited(setting: str, *, dtype: str = "fp32", canaries: int = 0) -> dict[str, Any]:
    """Run the audit once and return who refuted the claim, and the figures."""
    keys = (*SETTINGS[setting], f"train.dtype={dtype}")
    config = read_config(SHIPPED, keys)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        try:
            audit(
                config,
                command_line=sys.argv,
                run_dir=place,
                canaries=canaries,
            )
        except RunFailed:
            if not (place / "summary.json").exists():
                raise
        summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    return {
        "setting": setting,
        "dtype": dtype,
        "passed": summary["passed"],
        "refuted_by": {f["audit"]: f["verdict"] for f in summary["findings"] if not f["passed"]},
        "figures": {f["audit"]: f["figure"] for f in summary["findings"]},
        "seconds": round(time.monotonic() - started, 1),
    }


def in_a_process(mutant: str, setting: str, canaries: int) -> dict[str, Any]:
    """Audit one mutant in a process of its own, which is forked so that nothing is read twice."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, mutant, setting, canaries))
    child.start()
    theirs.close()
    try:
        result: dict[str, Any] = ours.recv()
    except EOFError:
        result = {"setting": setting, "passed": False, "refuted_by": {"the process": "it died"}}
    child.join()
    return {"mutant": mutant, **result}


def _child(theirs: Any, mutant: str, setting: str, canaries: int) -> None:
    MUTANTS[mutant](setattr)
    dtype = "bf16" if mutant in BF16 else "fp32"
    try:
        result = audited(setting, dtype=dtype, canaries=canaries)
    except RunFailed as error:
        # a mutant on which the product's own guards stop is caught by them
        stopped = {"the run itself stopped": str(error)}
        result = {"setting": setting, "dtype": dtype, "passed": False, "refuted_by": stopped}
    theirs.send(result)


def sound(setting: str, dtype: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up audits of the product as it is."""
    return {
        "setting": setting,
        "dtype": dtype,
        "audits": len(results),
        "passed": sum(result["passed"] for result in results),
        "refuted_by": Counter(name for result in results for name in result["refuted_by"]),
        "figures": {name: [r["figures"][name] for r in results] for name in results[0]["figures"]},
        "seconds": round(sum(result["seconds"] for result in results), 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the table, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutant", choices=list(MUTANTS), help="default: all")
    parser.add_argument("--setting", choices=list(SETTINGS), help="default: all")
    parser.add_argument("--sound", type=int, default=100, help="audits of the product as it is")
    parser.add_argument("--dtype", default="fp32", help="of the sound audits")
    parser.add_argument("--canaries", type=int, default=100)
    parser.add_argument("--no-mutants", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    facts = {key: value for key, value in vars(options).items() if key != "out"}
    table: dict[str, Any] = {"options": facts, "mutants": [], "sound": []}
    chosen = [options.mutant] if options.mutant else list(MUTANTS)
    for setting in [options.setting] if options.setting else list(SETTINGS):
        with_calibrated_noise(read_config(SHIPPED, SETTINGS[setting]))  # once for all forks
        for mutant in () if options.no_mutants else chosen:
            row = in_a_process(mutant, setting, options.canaries)
            table["mutants"].append(row)
            caught = ", ".join(row["refuted_by"]) or "NOT CAUGHT"
            print(f"{setting:8} {mutant:30} {caught}", flush=True)
            save(options.out, table)
        results: list[dict[str, Any]] = []
        rows = table["sound"]
        for number in range(options.sound):
            results.append(audited(setting, dtype=options.dtype, canaries=options.canaries))
            rows[:] = [row for row in rows if row["setting"] != setting]
            rows.append(sound(setting, options.dtype, results))
            save(options.out, table)
            if number + 1 in (options.sound // 2, options.sound):
                print(f"{setting:8} sound: {rows[-1]['passed']} of {number + 1} pass", flush=True)
    clean = all(not row["passed"] for row in table["mutants"])
    return 0 if clean and all(r["passed"] == r["audits"] for r in table["sound"]) else 1


def save(place: Path | None, table: dict[str, Any]) -> None:
    """Write what there is so far."""
    if place:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
