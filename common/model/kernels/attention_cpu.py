"""Causal attention over packed segments on the CPU: in bf16 our own blocked products.

The backward of torch's CPU flash kernel is a third of a training step, and its forward a fifth on a
processor with AVX512-BF16 and no AMX. In bf16 these are matrix products of our own
(FlashAttention-2, Dao 2023, algorithms 1 and 2), one block of queries at a time, in which
grouped-query heads share one product: the backward everywhere; on such a processor the forward too,
and one token's attention to its cache. In fp32 torch's kernels are kept.

Shapes: T packed tokens, H query heads, G key/value heads, E head width, Q rows of a query block
(times the heads of a group), K keys up to the block's end, W = E + 2; B sequences, L cache columns,
N heads of a group.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from common.undocumented.torch_names import flash_attention_backward, flash_attention_forward

_BLOCK_TOKENS = 128
_LARGE_SCORE = 2.0**12
_CACHED_BYTES = 2**22
"""Of keys in fp32, so that they stay in the processor's cache."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


def packed_attention(
    q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor, scaling: float, bounds: tuple[int, ...]
) -> Tensor:
    """Attend causally within each segment.

    Args:
        q_THE: Queries.
        k_TGE: Keys; H is a multiple of G.
        v_TGE: Values.
        scaling: Factor of the scores.
        bounds: S + 1 token offsets of the segments.

    Returns:
        [T, H, E] outputs.
    """
    out: Tensor = _packed_attention(q_THE, k_TGE, v_TGE, scaling, bounds)
    return out


def attends_by_products(query: Tensor) -> bool:
    """Tell whether our products stand for torch's kernel: in bf16, with AVX512-BF16 and no AMX."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and _multiplies_bf16()


def token_attention(
    q_BH1E: Tensor, k_BGLE: Tensor, v_BGLE: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Attend from one token of each sequence to what is in its cache.

    Args:
        q_BH1E: Queries.
        k_BGLE: Keys; H is a multiple of G.
        v_BGLE: Values.
        scaling: Factor of the scores.
        mask: [B, 1, 1, L], true where a sequence has a column; None if all have all.

    Returns:
        [B, 1, H, E] outputs.
    """
    batch, heads, _, width = q_BH1E.shape
    groups, columns = k_BGLE.shape[1:3]
    q_BGNE = q_BH1E.reshape(batch, groups, heads // groups, width).float() * scaling
    at_once = max(1, _CACHED_BYTES // (4 * groups * columns * width))
    outputs = []
    for start in range(0, batch, at_once):
        some = slice(start, start + at_once)
        scores_BGNL = q_BGNE[some] @ k_BGLE[some].float().transpose(2, 3)
        if mask is not None:
            scores_BGNL.masked_fill_(~mask[some], -torch.inf)
        outputs.append(scores_BGNL.softmax(-1).to(v_BGLE.dtype) @ v_BGLE[some])
    return torch.cat(outputs).reshape(batch, 1, heads, width)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, bounds: tuple[int, ...]
    ) -> Tensor:
        out = torch.empty_like(q)
        lse_HT = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
        segment_forward = _bf16_forward if attends_by_products(q) else _torch_forward
        for start, stop in itertools.pairwise(bounds):
            q_part, k_part, v_part, out_part = (t[start:stop] for t in (q, k, v, out))
            lse_part = lse_HT[:, start:stop]
            segment_forward(q_part, k_part, v_part, scaling, out_part, lse_part)
        ctx.scaling, ctx.bounds = scaling, bounds
        ctx.save_for_backward(q, k, v, out, lse_HT)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_HT = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        segment_backward: Any = _bf16_backward if q.dtype == torch.bfloat16 else _torch_backward
        for start, stop in itertools.pairwise(ctx.bounds):
            parts = [t[start:stop] for t in (q, k, v, out, d_out)]
            grads = segment_backward(*parts, lse_HT[:, start:stop], ctx.scaling)
            for total, grad in zip((d_q, d_k, d_v), grads, strict=True):
                total[start:stop] = grad
        return d_q, d_k, d_v, None, None


# torch's stubs leave Function.apply untyped.
_packed_attention: Any = _PackedAttention.apply


def _heads_first(t_THE: Tensor) -> Tensor:
    return t_THE.transpose(0, 1)[None]


@functools.cache
def _multiplies_bf16() -> bool:
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16")) and not able.get("amx_tile")


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, out: Tensor, lse_HT: Tensor
) -> None:
    """Write one segment's outputs and log-sum-exp by torch's kernel."""
    q_part, k_part, v_part = map(_heads_first, (q, k, v))
    part, lse = flash_attention_forward(q_part, k_part, v_part, 0.0, True, scale=scaling)
    out.copy_(part[0].transpose(0, 1))
    lse_HT.copy_(lse[0])


def _bf16_forward(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, out: Tensor, lse_HT: Tensor
) -> None:
    """Write one segment's outputs and log-sum-exp by blocked bf16 products.

    The scores are computed twice, the second time less their row's maximum (a row term, see
    ``_bf16_backward``): two products that are rounded cost less than one that is kept in fp32.
    """
    tokens, heads, width = q.shape
    groups = k.shape[1]
    shared = heads // groups
    q_rows_GNE = _group_rows(q, groups)
    k_ones_GTW, v_GTE = _with_ones(k), v.transpose(0, 1)
    block = min(_BLOCK_TOKENS, tokens)
    future = _future(block, q.dtype)
    scratch = torch.empty(groups * block * shared * tokens, dtype=q.dtype)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        q_GQE = q_rows_GNE[:, start * shared : stop * shared]
        size = (groups, (stop - start) * shared, stop)
        later = future[: stop - start, :, : stop - start]
        p_GQK = scratch[: size[0] * size[1] * size[2]].view(size)
        _scores(q_GQE, k_ones_GTW[:, :stop, :width], later, 1.0, out=p_GQK)
        highest_GQ = p_GQK.amax(2)
        q_terms_GQW = _with_row_terms(q_GQE, -highest_GQ)
        _scores(q_terms_GQW, k_ones_GTW[:, :stop], later, scaling, out=p_GQK)
        if float(highest_GQ.abs().amax()) * scaling > _LARGE_SCORE:
            # Rounded to bf16, a maximum of this size may be too small by more than exp can hold.
            highest_GQ = highest_GQ + p_GQK.amax(2).float() / scaling
            q_terms_GQW = _with_row_terms(q_GQE, -highest_GQ)
            _scores(q_terms_GQW, k_ones_GTW[:, :stop], later, scaling, out=p_GQK)
        torch.exp(p_GQK, out=p_GQK)
        sum_GQ = p_GQK.sum(2, dtype=torch.float32)
        out_GQE = torch.bmm(p_GQK, v_GTE[:, :stop]) / sum_GQ[..., None]
        by_token = out[start:stop].view(stop - start, groups, shared, width)
        by_token.copy_(out_GQE.view(groups, stop - start, shared, width).transpose(0, 1))
        lse_GQ = (
            highest_GQ.float().mul_(scaling).add_(sum_GQ.log()).view(groups, stop - start, shared)
        )
        lse_HT[:, start:stop].view(groups, shared, -1).copy_(lse_GQ.transpose(1, 2))


def _scores(q_GQW: Tensor, k_GKW: Tensor, future: Tensor, scaling: float, *, out: Tensor) -> None:
    """Write a block's queries times all keys up to its end, scaled; -inf for the future."""
    torch.baddbmm(out, q_GQW, k_GKW.transpose(1, 2), beta=0, alpha=scaling, out=out)
    groups, rows, keys = out.shape
    tokens = len(future)
    out.view(groups, tokens, rows // tokens, keys)[..., -tokens:].add_(future)


def _future(tokens: int, dtype: torch.dtype) -> Tensor:
    """Return [tokens, 1, tokens]: what is added to the scores of a block with itself."""
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu(1)[:, None]


def _torch_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse_HT: Tensor, scaling: float
) -> Gradients:
    """Return one segment's gradients by torch's kernel, which wants as many keys as queries."""
    tokens, groups, width = k.shape
    shared = q.shape[1] // groups
    k_all, v_all = (t.repeat_interleave(shared, 1) for t in (k, v))
    q_part, k_part, v_part, out_part, d_part = map(_heads_first, (q, k_all, v_all, out, d_out))
    grads = flash_attention_backward(
        d_part, q_part, k_part, v_part, out_part, lse_HT[None], 0.0, True, scale=scaling
    )
    d_q, d_k, d_v = (grad[0].transpose(0, 1) for grad in grads)
    d_k, d_v = (t.reshape(tokens, groups, shared, width).sum(2) for t in (d_k, d_v))
    return d_q, d_k, d_v


def _bf16_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse_HT: Tensor, scaling: float
) -> Gradients:
    """Return one segment's gradients by blocked bf16 products.

    Row terms ride along in the products as two extra columns each, high and low part, so that
    ``scaling q k - lse`` and ``dout v - delta`` leave the fp32 accumulators already subtracted:
    one pass less over the scores, and rounding to bf16 falls on small numbers where it matters.
    """
    tokens, heads, width = q.shape
    groups = k.shape[1]
    shared = heads // groups
    q_rows_GNE = _group_rows(q, groups)
    d_rows_GNE = _group_rows(d_out, groups)
    delta_TH = (out.float() * d_out).sum(2)
    minus_lse_GN = -lse_HT.view(groups, shared, tokens).transpose(1, 2).reshape(groups, -1)
    minus_delta_GN = -delta_TH.view(tokens, groups, shared).transpose(0, 1).reshape(groups, -1)
    q_terms_GNW = _with_row_terms(q_rows_GNE, minus_lse_GN / scaling)
    d_terms_GNW = _with_row_terms(d_rows_GNE, minus_delta_GN)
    k_ones_GTW, v_ones_GTW = (_with_ones(t) for t in (k, v))
    d_q = torch.empty_like(q)
    d_k_GTE = torch.zeros(groups, tokens, width)
    d_v_GTE = torch.zeros(groups, tokens, width)
    block = min(_BLOCK_TOKENS, tokens)
    future = _future(block, q.dtype)
    scratch = torch.empty(2, groups * block * shared * tokens, dtype=q.dtype)
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        rows = slice(start * shared, stop * shared)
        size = (groups, (stop - start) * shared, stop)
        p_GQK, ds_GQK = (s[: size[0] * size[1] * size[2]].view(size) for s in scratch)
        later = future[: stop - start, :, : stop - start]
        _scores(q_terms_GNW[:, rows], k_ones_GTW[:, :stop], later, scaling, out=p_GQK)
        torch.exp(p_GQK, out=p_GQK)
        torch.bmm(d_terms_GNW[:, rows], v_ones_GTW[:, :stop].transpose(1, 2), out=ds_GQK)
        ds_GQK.mul_(p_GQK)
        d_v_GTE[:, :stop] += torch.bmm(p_GQK.transpose(1, 2), d_rows_GNE[:, rows])
        d_k_GTE[:, :stop] += torch.bmm(ds_GQK.transpose(1, 2), q_rows_GNE[:, rows])
        d_q_GQE = torch.bmm(ds_GQK, k_ones_GTW[:, :stop, :width])
        d_q_part = d_q_GQE.view(groups, stop - start, shared, width).transpose(0, 1)
        torch.mul(d_q_part, scaling, out=d_q[start:stop].view(d_q_part.shape))
    return d_q, d_k_GTE.mul_(scaling).transpose(0, 1), d_v_GTE.transpose(0, 1)


def _group_rows(t_THE: Tensor, groups: int) -> Tensor:
    """Return [G, T * H / G, E]: the rows that meet the same keys, tokens outermost."""
    tokens, heads, width = t_THE.shape
    rows = t_THE.view(tokens, groups, heads // groups, width).transpose(0, 1)
    return rows.reshape(groups, -1, width)


def _with_row_terms(t_GNE: Tensor, terms_GN: Tensor) -> Tensor:
    high = terms_GN.to(t_GNE.dtype)
    low = (terms_GN - high).to(t_GNE.dtype)
    return torch.cat([t_GNE, high[..., None], low[..., None]], 2)


def _with_ones(t_TGE: Tensor) -> Tensor:
    ones = torch.ones(t_TGE.shape[1], t_TGE.shape[0], 2, dtype=t_TGE.dtype)
    return torch.cat([t_TGE.transpose(0, 1), ones], 2)
