"""A unit's gradient is a function of that unit alone, in every arithmetic, whatever it holds."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.choice import Choice
from common.errors import UserError
from common.model.adapter.falora import AdapterSpec
from common.model.backbone.load import resolve_backbone
from common.model.kernels import attention, choice, elementwise_compiled, frozen
from common.model.kernels.attention import KERNELS, Packing, attend, choose_attention
from common.model.kernels.elementwise import TORCH
from common.model.kernels.elementwise_compiled import COMPILED
from common.model.kernels.rope import BY_LENGTH, FIXED
from common.model.session import DTYPES, Session, open_session
from common.privacy.mechanism import gradients
from common.privacy.mechanism.clipping import clipped_sum
from common.privacy.mechanism.gradients import PrivateGradient
from common.privacy.mechanism.isolation import check_backbone, choose_passes
from common.privacy.mechanism.noise import NoiseSource
from common.text.batches import Encoded, pack
from common.training.gradients import add_unit_gradients


def private(samples: list[Encoded], plan) -> PrivateGradient:
    return PrivateGradient(samples, plan, NoiseSource(), seed=0, micro_batch=4)


def excess_without(session: Session, samples: list[Encoded], plan, gone: int) -> float:
    """How far the clipped sum moves beyond the leaving unit's own part, in clip norms."""
    source, everyone = private(samples, plan), [(place,) for place in range(len(samples))]
    rest = everyone[:gone] + everyone[gone + 1 :]
    whole, without, own = (
        source.clipped_sum(session, units) for units in (everyone, rest, [everyone[gone]])
    )
    assert float(without.norm()) > 0
    assert bool(torch.isfinite(whole).all())
    assert float(own.norm()) <= plan.clip_norm * (1 + 1e-6)
    return float((whole - without - own).norm()) / plan.clip_norm


def mixed(session: Session) -> Choice[str]:
    """The mutant: units share passes by the same calls for all of them."""
    return Choice("shared", "")


def excess_without_the_first(session: Session, samples: list[Encoded], plan) -> float:
    return excess_without(session, samples, plan, 0)


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_units_do_not_touch_each_other_on_a_real_backbone(
    dtype, samples_of, make_plan, monkeypatch
) -> None:
    session = open_session(
        resolve_backbone("embedded"), AdapterSpec(), device="cpu", dtype=dtype, threads=1
    )
    noise = torch.randn(session.adapter.flat.shape, generator=torch.Generator().manual_seed(7))
    session.adapter.flat.add_(noise, alpha=0.02)
    samples, plan = samples_of([90, 31, 120, 64, 77, 45], range(6)), make_plan(clip_norm=0.1)
    assert excess_without_the_first(session, samples, plan) < 1e-5
    if dtype == "bf16" and torch.cpu.get_capabilities().get("amx_tile"):
        # the mutant: units share passes that mix them, whatever the arithmetic
        monkeypatch.setattr(
            gradients, "add_unit_gradients", lambda *a, apart: add_unit_gradients(*a)
        )
        assert excess_without_the_first(session, samples, plan) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "can_be_kept", "passes"),
    [
        *((dtype, True, [(4, True), (2, True)]) for dtype in ("fp32", "bf16")),
        *((dtype, False, [(1, False), (2, False), (2, False), (1, False)]) for dtype in DTYPES),
    ],
)
def test_no_pass_mixes_units(
    open_tiny, samples_of, make_plan, monkeypatch, dtype, can_be_kept, passes
) -> None:
    seen = []

    def spied(session, batch, rows, out_UP, *, apart):
        seen.append((batch.segments, apart))
        return add_unit_gradients(session, batch, rows, out_UP, apart=apart)

    monkeypatch.setattr(Session, "keeps_apart", can_be_kept)
    monkeypatch.setattr(gradients, "add_unit_gradients", spied)
    source = private(samples_of([8] * 6, [0, 1, 1, 2, 2, 3]), make_plan())
    source.clipped_sum(open_tiny(dtype=dtype), [(0,), (1, 2), (3, 4), (5,)])
    assert seen == passes


@pytest.mark.parametrize(
    ("dtype", "lengths", "passes"),
    [
        ("bf16", [8, 9, 10, 11, 8, 11], [[8, 9, 10], [11, 8, 11]]),
        ("bf16", [8] * 6, [[8] * 4, [8] * 2]),
        ("fp32", [8, 9, 10, 11, 8, 11], [[8, 9, 10], [11, 8, 11]]),
    ],
)
def test_a_pass_that_keeps_patients_apart_has_few_lengths(
    open_tiny, samples_of, make_plan, monkeypatch, dtype, lengths, passes
) -> None:
    """Each has products of its own, and a CPU keeps as many compiled as ``LENGTHS_APART`` need."""
    seen = []

    def spied(session, batch, rows, out_UP, *, apart):
        bounds = batch.cu_seqlens
        seen.append([stop - start for start, stop in itertools.pairwise(bounds)])
        return add_unit_gradients(session, batch, rows, out_UP, apart=apart)

    monkeypatch.setattr(gradients, "add_unit_gradients", spied)
    source = private(samples_of(lengths, range(6)), make_plan())
    total_P = source.clipped_sum(open_tiny(dtype=dtype), [(place,) for place in range(6)])
    assert seen == passes
    # So that many passes round no further than one: the noise allows for 2**-10 of a clip norm.
    assert total_P.dtype == torch.float64


def test_lengths_are_those_of_the_step(open_tiny, samples_of, make_plan, monkeypatch) -> None:
    """A sample may be longer than what a step sees of it, as where lists are learnt as sets."""

    class Longer(Encoded):
        def in_epoch(self, epoch: int) -> Encoded:
            return Encoded(input_ids=self.input_ids[:6], answer_start=2, unit=self.unit)

    seen = []

    def spied(session, batch, rows, out_UP, *, apart):
        seen.append(batch.segments)
        return add_unit_gradients(session, batch, rows, out_UP, apart=apart)

    monkeypatch.setattr(gradients, "add_unit_gradients", spied)
    samples = [
        Longer(input_ids=one.input_ids, answer_start=one.answer_start, unit=one.unit)
        for one in samples_of([8, 9, 10, 11], range(4))
    ]
    private(samples, make_plan()).clipped_sum(open_tiny(dtype="bf16"), [(p,) for p in range(4)])
    assert seen == [4]


RARE = 1001
"""A token that only one unit has."""
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    ),
]


def kernel_or_skip(kernel: str, device: str, dtype: str) -> None:
    try:
        choose_attention(kernel, torch.device(device), DTYPES[dtype])
    except UserError as obstacle:
        pytest.skip(str(obstacle))


def embed(session: Session, row_D: Tensor) -> None:
    """Give the rare token an embedding, and the head weights of its own."""
    model = session.model
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    model.model.embed_tokens.weight[RARE] = row_D.to(head)


def not_a_number(session: Session) -> None:
    embed(session, torch.full((64,), torch.nan))


def infinite(session: Session) -> None:
    embed(session, torch.full((64,), torch.inf))


def square_overflows(session: Session) -> None:
    embed(session, torch.full((64,), 1e38))


def product_overflows(session: Session) -> None:
    """B meets a direction that the rare token alone has, and overflows there."""
    weight_VD = session.model.model.embed_tokens.weight
    weight_VD[:, 0] = 0.0
    embed(session, torch.eye(64)[0])
    adapter = session.adapter
    for module in adapter.modules[:2]:
        assert module.key.startswith("model.layers.0.")
        module.lora_A[0] = torch.eye(64)[0].to(module.lora_A)
        adapter.flat[adapter.slices[module.key + ".lora_B"]].view(-1, 4)[:, 0] = 3e38


def poisoned(lengths: list[int], place: int, samples_of: Callable) -> list[Encoded]:
    samples = samples_of(lengths, range(len(lengths)))
    ids = list(samples[place].input_ids)
    ids[3] = RARE
    samples[place] = replace(samples[place], input_ids=tuple(ids))
    assert sum(RARE in sample.input_ids for sample in samples) == 1
    return samples


def mixing_eager(q: Tensor, k: Tensor, v: Tensor, scaling: float, packing: Packing) -> Tensor:
    """The mutant: one product over all segments, with zeros where they meet."""
    shared = q.shape[1] // k.shape[1]
    tokens = torch.arange(len(q))
    segments = torch.bucketize(tokens, packing.bounds_device[1:], right=True)
    seen = (segments[:, None] == segments[None, :]) & (tokens[:, None] >= tokens[None, :])
    k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
    scores = q.transpose(0, 1) @ k.permute(1, 2, 0) * scaling
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v.transpose(0, 1)).transpose(0, 1)


POISONS = [not_a_number, infinite, square_overflows, product_overflows]


@pytest.mark.slow
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    ("dtype", "layers"), [("fp32", "lean"), ("fp32", "transformers"), ("bf16", "lean")]
)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_overflows_in_one_unit_stays_there(
    open_tiny, samples_of, make_plan, monkeypatch, device, kernel, dtype, layers, poison
) -> None:
    kernel_or_skip(kernel, device, dtype)
    if layers == "transformers":
        monkeypatch.setattr("common.model.kernels.fused_layer.supported", lambda model: False)
    plan = make_plan(clip_norm=0.5)
    session = open_tiny(device=device, dtype=dtype, attention=kernel)
    with torch.no_grad():
        poison(session)
    for place in (0, 5):
        samples = poisoned([20, 31, 12, 7, 27, 15], place, samples_of)
        assert excess_without(session, samples, plan, place) < 1e-5
    shared = device == "cpu" and kernel == "eager" and dtype == "fp32"
    if shared and poison is not square_overflows:
        monkeypatch.setattr(gradients, "choose_passes", mixed)
        monkeypatch.setitem(attention._KERNEL_FUNCTIONS, "eager", mixing_eager)
        samples = poisoned([20, 31, 12, 7, 27, 15], 0, samples_of)
        assert excess_without(session, samples, plan, 0) > 1.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_value_crosses_a_segments_edge_in_a_kernel(device, kernel, dtype, poison) -> None:
    """Forward and backward, a neighbour before and behind: the same as alone."""
    kernel_or_skip(kernel, device, dtype)
    bounds, generator = (0, 9, 150, 163), torch.Generator().manual_seed(0)
    shapes = [(163, 4, 16), (163, 2, 16), (163, 2, 16), (163, 4, 16)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    whole = [t.to(device, DTYPES[dtype]) for t in whole]
    middle = slice(9, 150)
    for tensor in whole:
        tensor[:9], tensor[150:] = poison, poison

    def run(tensors: list[Tensor], edges: tuple[int, ...]) -> list[Tensor]:
        q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
        longest = max(b - a for a, b in itertools.pairwise(edges))
        on_device = torch.tensor(edges, dtype=torch.int32, device=device)
        packing = Packing(bounds=edges, bounds_device=on_device, longest=longest, kernel=kernel)
        out = attend(q, k, v, 0.25, packing)
        out.backward(tensors[3])
        return [out.detach(), q.grad, k.grad, v.grad]

    packed = run(whole, bounds)
    alone = run([tensor[middle] for tensor in whole], (0, 141))
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours[middle], theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_b_of_a_servers_choice_makes_units_depend_on_each_other(
    open_tiny, samples_of, make_plan, dtype
) -> None:
    """A large B makes much of a product's last bit, which follows from the pass's size.

    In passes that mix them the fp32 units moved by 3e-6 here, where MKL multiplies five rows
    otherwise than 255, and on SmolLM2-135M by 0.7 clip norms.
    """
    session = open_tiny(dtype=dtype)
    samples, plan = samples_of([5, 250], range(2)), make_plan(clip_norm=1e-6)
    for _ in range(2):
        assert excess_without_the_first(session, samples, plan) < 1e-12
        session.adapter.flat.mul_(100)


def test_units_share_passes_only_where_they_are_kept_apart(open_tiny) -> None:
    for kernel, dtype in itertools.product(("sdpa", "eager"), DTYPES):
        assert choose_passes(open_tiny(attention=kernel, dtype=dtype)).value == "apart"
    session = open_tiny()
    for device, kernel in (("cuda", "sdpa"), ("cpu", "of-tomorrow"), ("cuda", "torch-flash")):
        session.device, session.attention = Choice(device, ""), Choice(kernel, "")
        assert choose_passes(session).value == "alone"
        assert kernel in choose_passes(session).reason
    # with kernels of a program for each row, and only then
    session.functions = replace(TORCH, by_row=True)
    assert choose_passes(session).value == "apart"
    session.weights = Choice("fp8", "")
    assert choose_passes(session).value == "alone"
    session.weights = Choice("nf4", "")
    assert choose_passes(session).value == "apart"
    for device, kernel in (("cuda", "of-tomorrow"), ("cpu", "of-tomorrow")):
        session.device, session.attention = Choice(device, ""), Choice(kernel, "")
        assert choose_passes(session).value == "alone"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_private_pass_runs_what_torch_has_compiled(open_tiny, samples_of, monkeypatch, dtype):
    """Which compiled code runs may depend on the lengths before: one patient's on another's."""

    def compiled(_function):
        raise AssertionError("compiled code in a private pass")

    samples = samples_of([24, 9, 13], range(3))
    gradients = []
    for session in (open_tiny(dtype=dtype), open_tiny(dtype=dtype)):
        if gradients:
            session.kernels, session.functions = Choice("compiled", ""), COMPILED
            for layer in session.model.model.layers:
                layer.kernels = COMPILED
            monkeypatch.setattr(elementwise_compiled, "_compiled", compiled)
            assert choose_passes(session).value == "apart"
        rows_UP = torch.zeros(3, session.adapter.flat.numel())
        add_unit_gradients(session, pack(samples[:1]), [0], rows_UP, apart=True)
        add_unit_gradients(session, pack(samples[1:]), [1, 2], rows_UP, apart=True)
        gradients.append(rows_UP)
    assert bool(gradients[0].any(1).all())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", [*FIXED, *BY_LENGTH])
def test_frequencies_that_follow_the_length_are_refused(
    open_tiny, samples_of, make_plan, kind
) -> None:
    session = open_tiny()
    session.spec = replace(session.spec, rope=kind)
    source = private(samples_of([8] * 2, [0, 1]), make_plan())
    if kind in FIXED:
        check_backbone(session.spec)
        source.clipped_sum(session, [(0,), (1,)])
        return
    with pytest.raises(UserError, match="length of the pass") as refused:
        check_backbone(session.spec)
    assert refused.value.exit_status == 2
    assert kind in str(refused.value)
    with pytest.raises(UserError, match="length of the pass"):
        source(session, 0)


class AdmissionsAdded(PrivateGradient):
    """The mutant: the sum of a patient's admissions in place of their mean."""

    def clipped_sum(self, session, drawn):
        rows_UP = torch.zeros(len(drawn), session.adapter.trainable_parameters)
        for row_P, members in zip(rows_UP, drawn, strict=True):
            samples = [self.dataset[index] for index in members]
            add_unit_gradients(session, pack(samples), [0] * len(samples), row_P[None])
        return clipped_sum(rows_UP, self.plan.clip_norm)


@pytest.mark.parametrize("clip_norm", [1e3, 0.1])
def test_a_patient_who_came_three_times_weighs_what_one_visit_weighs(
    open_tiny, samples_of, make_plan, clip_norm
) -> None:
    """Oracle: the mean of equal admissions is each of them, however often a patient came."""
    session, plan = open_tiny(), make_plan(clip_norm=clip_norm)
    (record,) = samples_of([12], [1])
    often, once = [record] * 3, [record]

    def contribution(kind: type[PrivateGradient], samples: list[Encoded]) -> torch.Tensor:
        source = kind(samples, plan, NoiseSource(), seed=0, micro_batch=2)
        return source.clipped_sum(session, source.units.members)

    single = contribution(PrivateGradient, once)
    assert float((contribution(PrivateGradient, often) - single).norm()) < 1e-5 * single.norm()
    added = contribution(AdmissionsAdded, often)
    if clip_norm > 1:  # where the clip is idle nothing but the mean keeps it at one visit's weight
        assert float((added - 3 * single).norm()) < 1e-5 * single.norm()


PATHS = [
    {"kernels": "triton"},
    {"weights": "fp8"},
    {"weights": "nf4"},
    {"weights": "fp8", "kernels": "triton"},
]
"""What runs on a GPU only, or when asked for; each by other means here."""


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_units_do_not_touch_each_other_on_any_path(
    open_tiny, samples_of, make_plan, monkeypatch, path
) -> None:
    if path.get("kernels") == "triton":
        pytest.importorskip("triton")
    if path.get("weights") == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(choice, "obstacle", lambda *_: "")
    monkeypatch.setattr(frozen, "fp8_obstacle", lambda device, dtype: "")
    monkeypatch.setattr(Session, "shortens", True)
    session = open_tiny(dtype="fp32", **path)
    noise = torch.randn(session.adapter.flat.shape, generator=torch.Generator().manual_seed(7))
    session.adapter.flat.add_(noise, alpha=0.02)
    samples, plan = samples_of([6, 4, 7], range(3)), make_plan(clip_norm=0.1)
    assert excess_without_the_first(session, samples, plan) < 1e-5
