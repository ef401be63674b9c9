"""What a server reads off one hospital's gradient: B alone against LoRA's A and B.

    OMP_NUM_THREADS=1 python benchmarks/privacy_server_view.py [--backbone tiny] [--out FILE]

Two attacks on the first layer's v_proj, whose input is known for every token of the vocabulary.
Both ask how much of a vector lies in the row space of the gradient (the subspace attacks of
arXiv 2604.21197): B's gradient is a sum of g (A x)^T, so its rows lie in the span of A x, at most
rank wide; A's is a sum of (B^T g) x^T, whose rows lie in the span of x itself.

- inversion: the tokens of one patient's record against the rest of the vocabulary;
- membership: the records that went into a step of `--members` patients against as many others, by
  the mean over a record's tokens.

The figure is the area under the ROC curve, 0.5 being chance, with a 95% interval over patients or
steps; epsilon is that of the one release at delta 1e-4. Reported whichever way it falls; of so many
intervals one in forty lies above chance by accident.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.privacy.accounting import calibrate
from common.privacy.canaries import area_with_deviation
from common.privacy.findings import mean_interval
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.noise import NoiseSource
from common.privacy.plan import PrivacyPlan
from common.seeds import stream
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients

MODES = {"B": "fa-lora", "A and B": "lora"}
PLAN = PrivacyPlan(
    clip_norm=1.0,
    noise_multiplier=None,
    sampling_rate=1.0,
    steps=1,
    expected_batch=1.0,
    max_admissions_per_patient=1,
    delta=1e-4,
)


def record(session: Session, tokens: int, unit: int) -> Encoded:
    """Make up a record of different tokens, half of them labels."""
    generator = stream(0, "server-view", tokens, unit)
    vocabulary = int(session.model.config.vocab_size)
    ids = generator.choice(vocabulary - 2, tokens + 1, replace=False) + 2
    return Encoded(input_ids=tuple(ids.tolist()), answer_start=tokens // 2 + 1, unit=unit)


def released(session: Session, records: Sequence[Encoded], plan: PrivacyPlan | None) -> Tensor:
    """Return one release, or the bare sum of gradients."""
    if plan is None:
        row_1P = torch.zeros(1, session.adapter.trainable_parameters)
        add_unit_gradients(session, pack(records), [0] * len(records), row_1P)
        return row_1P[0]
    source = PrivateGradient(records, plan, NoiseSource(), seed=0, micro_batch=len(records))
    source(session, 0)
    return session.adapter.flat_grad.clone()


def inside(session: Session, gradient_P: Tensor, tokens: int) -> np.ndarray[Any, Any]:
    """Return for every token of the vocabulary how much of it lies in the gradient's row space.

    Args:
        session: The open session.
        gradient_P: What the server got.
        tokens: How many tokens went in: the attacker is told.
    """
    adapter, layer = session.adapter, session.model.model.layers[0]
    (module,) = [
        m for m in adapter.modules if m.key.startswith("model.layers.0.") and "v_proj" in m.key
    ]
    with torch.no_grad():
        x_VD = layer.input_layernorm(session.model.model.embed_tokens.weight).double()
        a_RD = module.lora_A.double()
    seen = []
    for part, vectors in (("lora_B", x_VD @ a_RD.T), ("lora_A", x_VD)):
        key = f"{module.key}.{part}"
        if key not in adapter.slices:
            continue
        gradient = gradient_P[adapter.slices[key]].view(adapter.shapes[key]).double()
        span = min(tokens, gradient.shape[1] - 1, gradient.shape[0])
        directions = torch.linalg.svd(gradient, full_matrices=False).Vh[:span].T
        seen.append(((vectors @ directions).norm(dim=1) / vectors.norm(dim=1)).numpy())
    # with both matrices the attacker takes the one that says more
    return max(seen, key=lambda share: float(np.std(share)))


def read(session: Session, plan: PrivacyPlan | None, tokens: int, repeats: int) -> list[float]:
    """Return the area of the inversion for each of several patients."""
    areas = []
    for unit in range(repeats):
        one = record(session, tokens, unit)
        share_V = inside(session, released(session, [one], plan), tokens)
        present = np.zeros(len(share_V), dtype=bool)
        present[list(one.input_ids[:-1])] = True
        areas.append(area_with_deviation(share_V[present], share_V[~present]).value)
    return areas


def membership_areas(
    session: Session, plan: PrivacyPlan | None, tokens: int, repeats: int, members: int
) -> list[float]:
    """Return the area of the membership attack for each of several steps."""
    areas = []
    for step in range(repeats):
        records = [
            record(session, tokens, 1000 + 2 * members * step + n) for n in range(2 * members)
        ]
        share_V = inside(session, released(session, records[:members], plan), tokens * members)
        scores = [float(share_V[list(one.input_ids[:-1])].mean()) for one in records]
        areas.append(area_with_deviation(scores[:members], scores[members:]).value)
    return areas


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the rows so far."""
    if options.out:
        facts = {key: value for key, value in vars(options).items() if key != "out"}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"options": facts, "rows": rows}, indent=1, allow_nan=False)
        options.out.write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Attack every cell, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--ranks", default="8,16,32")
    parser.add_argument("--tokens", default="16,64,256,512")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    plans = {"none": None, "6": calibrate(PLAN, 6.0), "1": calibrate(PLAN, 1.0)}
    spec, rows = resolve_backbone(options.backbone), []
    for rank in [int(text) for text in options.ranks.split(",")]:
        for shared, mode in MODES.items():
            adapter = AdapterSpec(rank=rank, alpha=float(rank), mode=mode)
            session = open_session(spec, adapter, device="cpu", dtype="fp32")
            generator = torch.Generator().manual_seed(7)
            # a B that was trained for a while: at zero A has no gradient
            noise_P = torch.randn(session.adapter.flat.shape, generator=generator)
            session.adapter.flat.add_(noise_P, alpha=0.02)
            for tokens in [int(text) for text in options.tokens.split(",")]:
                for target, plan in plans.items():
                    row: dict[str, Any] = {
                        "shared": shared,
                        "rank": rank,
                        "tokens": tokens,
                        "epsilon": target,
                        "null": 0.5,
                    }
                    for attack, areas in (
                        ("inversion", read(session, plan, tokens, options.repeats)),
                        (
                            "membership",
                            membership_areas(
                                session, plan, tokens, options.repeats, options.members
                            ),
                        ),
                    ):
                        low, high = np.clip(mean_interval(areas), 0, 1).tolist()
                        verdict = "chance" if low <= 0.5 else "discloses"
                        row[attack] = {
                            "area": float(np.mean(areas)),
                            "interval": [low, high],
                            "verdict": verdict,
                        }
                    rows.append(row)
                    save(options, rows)
                    cells = " ".join(
                        f"{attack} {row[attack]['area']:.3f} "
                        f"({row[attack]['interval'][0]:.2f}-{row[attack]['interval'][1]:.2f})"
                        for attack in ("inversion", "membership")
                    )
                    print(f"{shared:8} r {rank:3} T {tokens:4} eps {target:5} {cells}", flush=True)
    return 0 if all(math.isfinite(row["inversion"]["area"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
