"""What a private step asks of the backbone: a unit's gradient depends on that unit alone.

That includes what is not a number: a neighbour that overflows must not reach across. Two ways:

- ``apart``: units share a packed pass whose every product, attention and elementwise function is by
  segment, by the same calls as if the segment were alone, or runs one program for each row;
- ``alone``: anywhere else every unit has passes of its own.
"""

from common.choice import Choice
from common.errors import UserError
from common.model.backbone.load import BackboneSpec
from common.model.kernels.attention import KERNELS
from common.model.kernels.rope import FIXED
from common.model.session import Session


def choose_passes(session: Session) -> Choice[str]:
    """Choose ``apart`` or ``alone``, and say why.

    In a pass that mixes them rows do depend on each other: kernels round and block by the pass's
    size. In bf16 that is 3% of a unit's gradient on SmolLM2-135M with AMX, and the sum moved by
    1.006 clip norms when one of 12 units left. In fp32 it is 1e-5 of short units, until a server
    sends a B that amplifies it: then it is 0.7 clip norms for each neighbour.
    """
    where = (session.torch_device.type, session.dtype.value, session.attention.value)
    weights = session.weights.value
    # fp8 products by segment have not passed the isolation test on a card.
    if where[2] in KERNELS and session.keeps_apart and weights != "fp8":
        return Choice("apart", f"each segment by calls of its own ({', '.join(where)})")
    named = ", ".join((*where, f"{weights} weights"))
    return Choice("alone", f"rows may depend on their neighbours ({named})")


def check_backbone(backbone: BackboneSpec) -> None:
    """Refuse a backbone whose result for a token follows from more than the tokens before it.

    Raises:
        UserError: naming the setting and the reason.
    """
    if backbone.rope not in FIXED:
        raise UserError(
            f"model.backbone={backbone.name} with privacy on: its rotary frequencies "
            f"(rope_type={backbone.rope}) depend on the length of the pass, so a token's result "
            "is not a function of the tokens before it",
            allowed=f"rope_type {', '.join(FIXED)}",
            fix="use another Llama, or set rope_type in its config.json",
        )
