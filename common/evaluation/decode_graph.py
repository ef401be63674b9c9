"""Generation on a GPU: each step one CUDA graph.

A step with one token for each of twenty sequences is a thousand small kernels; a GPU finishes them
faster than a host can name them. The slots do not move, so a step is recorded once for each bucket
of cache columns and then replayed. Every slot takes part in every step, free ones too: what they
compute is read by nobody.

Shapes: B slots, H query heads, G key/value heads, S = H / G, C columns of the bucket, E head
width, D hidden width, T packed prompt tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.evaluation.slot_generation import SlotGeneration
from common.model.kernels.rope import BY_LENGTH
from common.model.session import Session

COLUMNS = 256
"""Width of a bucket; each is recorded once."""


def supported(session: Session) -> bool:
    """Say whether a session's steps can be recorded: on a CUDA device, with lean layers."""
    from common.model.kernels import fused_layer as lean

    fixed = session.spec.rope not in BY_LENGTH  # else no table of their angles can be made
    return session.torch_device.type == "cuda" and fixed and lean.supported(session.model)


class StepGraphs:
    """One decoding step over all slots, recorded for each bucket of columns.

    Args:
        session: Backbone, with the adapter folded into its weights.
        slots: B.
        columns: Longest prompt and answer.
        record: False runs the step as it is (on a CPU, in tests).
    """

    def __init__(self, session: Session, *, slots: int, columns: int, record: bool = True) -> None:
        self.session, self._record = session, record
        self._columns = -(-columns // COLUMNS) * COLUMNS
        shape, model = session.spec.shape, session.model.model
        weight = model.embed_tokens.weight
        device = weight.device
        size = (shape.layers, 2, slots, shape.kv_heads, self._columns, shape.head_dim)
        # Zeros, not empty: a weight of 0 times a stray NaN would be NaN.
        self._kv = torch.zeros(size, dtype=weight.dtype, device=device)
        self._tokens_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self._lengths_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self._slots_B = torch.arange(slots, device=device)
        places_1C = torch.arange(self._columns, device=device)[None]
        cos, sin = model.rotary_emb(weight[:1], places_1C)
        self._cos_CE, self._sin_CE = cos[0], sin[0]
        self._graphs: dict[int, tuple[Any, Tensor]] = {}

    def fill(self, layer: int, k_TGE: Tensor, v_TGE: Tensor, slot_T: Tensor, at_T: Tensor) -> None:
        """Write what one layer made of packed prompts into their slots, from column 0 on."""
        self._kv[layer, 0][slot_T, :, at_T] = k_TGE
        self._kv[layer, 1][slot_T, :, at_T] = v_TGE

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        self._kv[:, :, target] = self._kv[:, :, source]

    def step(self, tokens: list[int], lengths: list[int]) -> Tensor:
        """Add a token to each of the first slots; returns the logits of the next ones.

        Args:
            tokens: Last token of each occupied slot.
            lengths: Columns that each fills already.

        Returns:
            [occupied, V]; overwritten by the next step.
        """
        occupied = len(tokens)
        self._tokens_B[:occupied] = torch.tensor(tokens).to(self._tokens_B.device)
        self._lengths_B[:occupied] = torch.tensor(lengths).to(self._tokens_B.device)
        # Free slots write over a column of their own, which their next prompt writes over.
        self._lengths_B[occupied:] = 0
        columns = -(-(max(lengths) + 1) // COLUMNS) * COLUMNS
        if not self._record:
            return self._logits(columns)[:occupied]
        if columns not in self._graphs:
            self._graphs[columns] = self._recorded(columns)
        graph, logits_BV = self._graphs[columns]
        graph.replay()
        return logits_BV[:occupied]

    def _recorded(self, columns: int) -> tuple[Any, Tensor]:
        # Twice the same step leaves the same cache; the first one loads and compiles kernels.
        new_stream: Any = torch.cuda.Stream
        here, aside = torch.cuda.current_stream(), new_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            self._logits(columns)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits_BV = self._logits(columns)
        return graph, logits_BV

    def _logits(self, columns: int) -> Tensor:
        model = self.session.model.model
        x_BD, beside_BD = model.embed_tokens(self._tokens_B), None
        angles = self._cos_CE[self._lengths_B], self._sin_CE[self._lengths_B]
        places_C = torch.arange(columns, device=x_BD.device)
        unseen_B11C = (places_C > self._lengths_B[:, None])[:, None, None]
        for layer, kv in zip(model.layers, self._kv, strict=True):
            normed_BD, x_BD = self._normed(x_BD, beside_BD, layer.input_layernorm)
            beside_BD = self._attended(layer, kv, normed_BD, angles, unseen_B11C)
            normed_BD, x_BD = self._normed(x_BD, beside_BD, layer.post_attention_layernorm)
            gate, up = layer.mlp.gate_proj(normed_BD), layer.mlp.up_proj(normed_BD)
            beside_BD = layer.mlp.down_proj(self.session.functions.swiglu(gate, up))
        normed_BD, _ = self._normed(x_BD, beside_BD, model.norm)
        logits_BV: Tensor = self.session.model.lm_head(normed_BD)
        return logits_BV

    def _attended(
        self,
        layer: Any,
        kv: Tensor,
        normed_BD: Tensor,
        angles: tuple[Tensor, Tensor],
        unseen_B11C: Tensor,
    ) -> Tensor:
        attention, slots = layer.self_attn, len(normed_BD)
        q_BHE, k_BGE, v_BGE = (
            projection(normed_BD).view(slots, -1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q_BHE, k_BGE = self.session.functions.rotate(q_BHE, k_BGE, *angles, False)
        for store, fresh in zip(kv, (k_BGE, v_BGE), strict=True):
            store[self._slots_B, :, self._lengths_B] = fresh
        keys, values = (store[:, :, : unseen_B11C.shape[-1]] for store in kv)
        # The queries of a group meet the same keys: one product, and no repeated keys.
        q_BGSE = q_BHE.view(slots, k_BGE.shape[1], -1, attention.head_dim)
        scores_BGSC = (q_BGSE * attention.scaling) @ keys.transpose(2, 3)
        scores_BGSC = scores_BGSC.float().masked_fill_(unseen_B11C, -torch.inf)
        out_BGSE = scores_BGSC.softmax(-1).to(values.dtype) @ values
        out_BD: Tensor = attention.o_proj(out_BGSE.reshape(slots, -1))
        return out_BD

    def _normed(
        self, x_BD: Tensor, beside_BD: Tensor | None, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Return the normed sum, and the sum."""
        epsilon: Any = norm.variance_epsilon
        weight_D: Any = norm.weight
        return self.session.functions.norm(x_BD, beside_BD, weight_D, epsilon)[:2]


class GraphGeneration(SlotGeneration):
    """Generation whose steps are recorded."""

    prefill_tokens = 8192
    _graphs: StepGraphs

    def _new_cache(self, slots: int, columns: int) -> StepGraphs:
        record = self.session.torch_device.type == "cuda"
        self._graphs = StepGraphs(self.session, slots=slots, columns=columns, record=record)
        return self._graphs

    def _step(self) -> None:
        """Add one token to every occupied slot."""
        rows = list(self.rows)
        logits_BV = self._graphs.step(
            [row.tokens[-1] for row in rows], [row.length for row in rows]
        )
        for row in rows:
            row.length += 1
        self.take(rows, logits_BV)
