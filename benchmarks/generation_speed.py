"""Generation: ours beside transformers' own ``generate`` at the same batch size (goal C7).

Same weights, same prompts (synthetic admissions), greedy, key/value cache on. Two workloads:

- fixed: every answer is forced to the same length, so no step is wasted by either side;
- mixed: answers have the lengths of the admissions' true lists; transformers runs a batch until
  its longest answer ends, ours gives a finished slot to the next prompt.

Also what the answer's grammar and a formulary add. Process CPU time, interleaved rounds, medians:

    OMP_NUM_THREADS=1 python benchmarks/generation_speed.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from common.config import OWN_TEXT, DataConfig
from common.data.prepare import load_samples
from common.evaluation.constrained import answer_grammar
from common.evaluation.formulary import formulary_of
from common.evaluation.generate import generate
from common.evaluation.ranking import Ranker
from common.evaluation.slot_generation import Generated, Matcher
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.session import Session, open_session
from common.text.batches import encode


class Script:
    """Says a given number of the model's own tokens, then the end."""

    def __init__(self, tokens: int, end: int) -> None:
        self._left, self._end = tokens, end

    def accepts(self, preferred: int) -> bool:
        """Leave every token to ``choose``."""
        return False

    def choose(self, logits_V: torch.Tensor, preferred: int) -> int:
        """Return the argmax that is not the end token, until the script is over."""
        self._left -= 1
        if self._left < 0:
            return self._end
        return preferred if preferred != self._end else int(logits_V.topk(2).indices[1])


def ours(
    session: Session, prompts: Sequence[list[int]], lengths: Sequence[int], batch: int
) -> list[Generated]:
    """Generate with slots."""
    # Slots are filled longest prompt first; hand the scripts out in the same order.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), -i), reverse=True)
    scripts = iter([lengths[i] for i in order])
    end = session.tokenizer.eos_token_id

    def matcher(prompt: int) -> Matcher:
        return Script(next(scripts), end)

    return generate(
        session,
        prompts,
        max_new_tokens=max(lengths) + 1,
        batch_size=batch,
        matcher=matcher,
    )


def transformers_generate(
    session: Session, prompts: Sequence[list[int]], lengths: Sequence[int], batch: int
) -> None:
    """Left-padded static batches, sorted by prompt length, each to its longest answer."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    end = session.tokenizer.eos_token_id
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(prompts[i]) for i in chosen)
            rows = [[end] * (longest - len(prompts[i])) + prompts[i] for i in chosen]
            masks = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
            tokens = max(lengths[i] for i in chosen)
            session.model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(masks),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=end,
            )


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this process that ``work`` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="answer length of `fixed`")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    session = open_session(
        resolve_backbone(options.backbone), AdapterSpec(), device="cpu", dtype=options.dtype
    )
    # A plain model for transformers: no adapter on the way, as after merge_and_unload.
    plain = open_session(
        resolve_backbone(options.backbone), AdapterSpec(), device="cpu", dtype=options.dtype
    )
    for module in plain.adapter.modules:
        module.merged_OD = module.weight
    plain.model.set_attn_implementation("sdpa")
    admissions = load_samples(DataConfig()).admissions[: options.samples]
    encoded = [
        encode(one, session.tokenizer, text=OWN_TEXT, max_length_tokens=2048) for one in admissions
    ]
    prompts = [list(one.input_ids[: one.answer_start]) for one in encoded]
    workloads = {
        "fixed": [options.tokens] * len(prompts),
        "mixed": [one.label_tokens - 1 for one in encoded],
    }
    report: dict[str, object] = {
        "backbone": options.backbone,
        "batch": options.batch,
        "dtype": session.dtype.value,
        "threads": torch.get_num_threads(),
        "prompt_tokens": sum(map(len, prompts)),
    }
    for name, lengths in workloads.items() if options.rounds else ():
        times: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(options.rounds):
            times["ours"].append(
                cpu_seconds(lambda n=lengths: ours(session, prompts, n, options.batch))
            )
            times["transformers"].append(
                cpu_seconds(
                    lambda n=lengths: transformers_generate(plain, prompts, n, options.batch)
                )
            )
        tokens = sum(lengths)
        middle = {who: statistics.median(values) for who, values in times.items()}
        report[name] = {
            "answer_tokens": tokens,
            "ours_tokens_per_cpu_second": round(tokens / middle["ours"], 1),
            "transformers_tokens_per_cpu_second": round(tokens / middle["transformers"], 1),
            "ratio": round(middle["transformers"] / middle["ours"], 2),
        }
    formulary = formulary_of(load_samples(DataConfig()).admissions)
    ranker = Ranker(session, formulary, text=OWN_TEXT, max_length_tokens=2048)
    report["grammar"] = matcher_cost(session, prompts, options, answer_grammar(session))
    report["formulary"] = matcher_cost(session, prompts, options, lambda prompt: ranker.matcher())
    print(json.dumps(report, indent=2))


class Timed:
    """A matcher that counts its own CPU time."""

    spent = 0.0

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher

    def accepts(self, preferred: int) -> bool:
        """Ask the matcher."""
        started = time.process_time()
        accepted = self._matcher.accepts(preferred)
        Timed.spent += time.process_time() - started
        return accepted

    def choose(self, logits_V: torch.Tensor, preferred: int) -> int:
        """Ask the matcher."""
        started = time.process_time()
        token = self._matcher.choose(logits_V, preferred)
        Timed.spent += time.process_time() - started
        return token


def matcher_cost(
    session: Session,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
    new: Callable[[int], Matcher],
) -> dict[str, float]:
    """What a grammar or a formulary adds to the CPU time of answers that keep to it.

    Constrained and free answers differ in length, so the matchers' own time is set against the
    rest of the same run.
    """
    new(0)  # a formulary's trie is built once, for any number of answers
    Timed.spent = 0.0
    whole = cpu_seconds(
        lambda: generate(
            session,
            prompts,
            max_new_tokens=options.tokens,
            batch_size=options.batch,
            matcher=lambda prompt: Timed(new(prompt)),
        )
    )
    return {"added": round(Timed.spent / (whole - Timed.spent), 4)}


if __name__ == "__main__":
    main()
