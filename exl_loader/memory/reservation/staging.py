"""What loading takes of main memory beside the buffers, on its way into them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...formats.dense import PIECE_BYTES
from ...model.parts.embedding import EMBEDDING_ROWS

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from ...model.builder import ModelParts

# The large ones of a quantised layer, EXL2's and GPTQ's.
STAGED_TENSORS = ("q_weight", "q_scale", "qweight", "qzeros", "scales")

# What is in flight at once, with what the C library keeps of what was freed: upper ends of
# measurements (6.4 and 1.7), held by tests/memory/test_keep.py.
STAGED_COPIES = 7
STAGED_LAYERS = 2


def staging_bytes(parts: ModelParts, checkpoint: Checkpoint) -> int:
    """Most that loading takes of main memory beside the buffers, until it ends.

    A quantised layer's tensors are read whole before they are packed; unquantised weights pass
    in pieces, which are checked and laid out anew on the way.
    """
    pieces, layers = [0], [0]
    for spec in parts.embedding.specs():
        vocab_size = parts.config.vocab_size
        pieces.append(spec.nbytes // vocab_size * min(EMBEDDING_ROWS, vocab_size))
    for plan in (linear.plan for linear in parts.linears()):
        if plan.format == "dense":
            pieces.append(min(PIECE_BYTES, plan.specs["weight"].nbytes))
        else:
            names = (f"{plan.source}.{tensor}" for tensor in STAGED_TENSORS)
            found = (
                checkpoint.headers[name].nbytes for name in names if name in checkpoint.headers
            )
            layers.append(sum(found))
    return max(STAGED_COPIES * max(pieces), STAGED_LAYERS * max(layers))
