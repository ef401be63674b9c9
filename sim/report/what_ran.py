"""What ran, with all that decides it."""

from common.config import Config
from common.configio import differences, file_keys
from common.data.protocols import ASKED, split_shares
from common.records.summary import Summary
from sim.report.html import Block
from sim.report.words import peak_memory, setting, speed

PLACES = ("run.", "judge.", "federation.workers")
"""Keys that name places and servers, or change nothing of a run's result."""


def what_ran(config: Config, summary: Summary) -> Block:
    """Return the facts of one run."""
    train, federation, adapter = config.train, config.federation, summary.adapter
    dtype, attention, scaling = summary.dtype, summary.attention, summary.scaling
    partition, data = config.partition, config.data
    validation, test = split_shares(data)
    scheme = f"{partition.scheme}"
    if partition.scheme == "dirichlet":
        scheme += f", alpha {partition.alpha:g}"
    facts = {
        "backbone": summary.backbone.name if summary.backbone else "–",
        "adapter": f"{adapter.mode}, rank {adapter.rank}, alpha {adapter.alpha:g}"
        if adapter
        else "–",
        "adapted projections": ", ".join(adapter.targets) if adapter else "–",
        "trainable parameters": f"{summary.trainable_parameters:,}",
        "task": f"{data.protocol}: {ASKED[data.protocol]}",
        "patients": f"{scheme}; held out: {validation:.3g} to validate, {test:.3g} to test",
    }
    if scaling:
        passes = "" if scaling.epochs is None else f", {scaling.epochs:g} epochs"
        facts["steps"] = f"{scaling.steps:,}{passes}"
    else:
        facts["hospitals, rounds"] = f"{len(summary.hospitals)}, {summary.rounds}"
        facts["steps"] = (
            f"train.steps {train.steps}, train.epochs {train.epochs:g} in all"
            if train.steps or train.epochs
            else f"{federation.local_steps} in each hospital and round"
        )
        facts["aggregation"] = (
            f"{federation.strategy}, weights by {federation.weighting}, {federation.fraction:g} "
            f"of the hospitals in a round, sent as {federation.codec}"
        )
    facts |= {
        "batch": "drawn by chance, see Privacy"
        if summary.privacy
        else f"{train.batch_size} samples, {train.accumulation} of these in a step",
        "optimizer": f"{train.optimizer}, learning rate {train.learning_rate:g}, state "
        + ("kept" if train.keep_state else "made anew in every round"),
        "schedule": f"{train.schedule}, warm-up {train.warmup_steps} steps",
        "longest sample": f"{train.max_length:,} tokens",
        "seeds": f"data order {train.seed}, A {config.adapter.seed}, hospitals {partition.seed}, "
        f"splits {data.split_seed}, rounds {federation.seed}, test cases {config.evaluation.seed}",
        "device": summary.device,
        "arithmetic": f"{dtype.value} ({dtype.reason})" if dtype else "–",
        "attention": f"{attention.kernel} ({attention.reason})" if attention else "–",
        "backbone loads, workers": f"{summary.backbone_loads}, {summary.workers}",
        "time": f"{summary.seconds:.0f} s",
        **({"one worker's speed": speed(summary)} if speed(summary) else {}),
        "peak memory": peak_memory(summary),
        "sha256 of B": summary.b_sha256,
    }
    rows = list(facts.items())
    rows += [("scaled", note) for note in (scaling.notes if scaling else ())]
    return Block(title="What ran", headers=("", ""), rows=tuple(rows), text_cells=True)


def settings(config: Config) -> Block:
    """List every key that was set: what is not listed has its default (configs/README.md)."""
    return Block(
        title="Settings beside the defaults",
        headers=("key", "value", "default"),
        rows=tuple(
            (change.key, setting(change.new), setting(change.old))
            for change in differences(Config(), config)
            if not change.key.startswith((*PLACES, *file_keys()))
        ),
        text_cells=True,
    )
