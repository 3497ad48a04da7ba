"""Tiles of logits that live and die on the chip, and the head's gradients from them: what the Triton kernels of both doors share.

Knows tiles and one rank's rows; refuses to know what the logits are for and that other ranks exist. Imports Triton, so it is
loaded only where these kernels are chosen. Under `TRITON_INTERPRET=1` the kernels run on CPU tensors.

Statistics are taken online, tile after tile, and no logit reaches memory. A gradient does, because its accumulators do not fit a
chip: D fp32 columns per token, or atomics on them. So the vocabulary is cut into blocks; of one block the gradient of the logits,
[T, b] in the dtype of the head within `WORKSPACE_BYTES`, is written once, and two plain matrix products read it. Blocks of the
vocabulary rather than of tokens, because each row of the head then gets its gradient from one product, summed in float32 and
rounded once; only the hidden states' gradient, which is float32 for the sum over the ranks anyway, is added to block by block.

Dimension key: T tokens, D hidden size, v vocabulary rows of this rank, b rows of one block, P parts that the rows are dealt to.
"""

# ruff: noqa: ANN001, ANN201 - arguments of kernels have types of Triton's own

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_opd.kernels.products import matmul, wide

LOG_ZERO = tl.constexpr(-1e30)  # as in kernels/logits.py: unlike -inf it can be subtracted from itself
WORKSPACE_BYTES = 256 * 2**20  # of the gradient of the logits, at most, unless one tile of rows for all tokens is more
TOKEN_GROUP = tl.constexpr(16)  # token tiles that walk through the head together, so that its tiles are read from the cache
WAVES = 4  # programs per processor at the least: the last, part-empty wave then costs little


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """The share of one program, and how the compiler is to build it."""

    tokens: int
    rows: int  # of the vocabulary, at a time
    depth: int  # of the hidden size, at a time
    pair: bool = False  # two tiles of rows side by side per step, so that hidden states are read half as often
    warps: int
    stages: int  # of the pipeline that loads ahead of the tensor cores

    @property
    def step_rows(self) -> int:
        """Rows of the vocabulary that a program takes up at once."""
        return self.rows * (2 if self.pair else 1)

    def of(self, tensor: torch.Tensor, extent: int) -> TensorDescriptor:
        """A matrix [n, D] to be read in tiles [extent, depth]; what lies outside is 0."""
        row_bytes = tensor.shape[1] * tensor.element_size()
        assert row_bytes % 16 == 0, f"a row of {tuple(tensor.shape)} has {row_bytes} bytes: the tile loader wants a multiple of 16"
        return TensorDescriptor.from_tensor(tensor.contiguous(), [extent, self.depth])

    def constants(self) -> dict[str, int | bool]:
        """What a kernel is specialised for, and the compiler's options. The interpreter cannot multiply bfloat16: it gets float32."""
        sizes = {"TOKENS": self.tokens, "ROWS": self.rows, "DEPTH": self.depth, "PAIR": self.pair, "WIDEN": triton.knobs.runtime.interpret}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# ---------------------------------------------------------------------------------------------------------- on the chip
@triton.jit
def logit_tiles(
    hidden, head, token, row, scale,
    D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """hidden[token:] @ head[row:].T * scale in one or two tiles [TOKENS, ROWS] side by side; float32 as three tf32 products."""
    z, beside = tl.zeros((TOKENS, ROWS), tl.float32), tl.zeros((TOKENS, ROWS), tl.float32)
    for d in range(0, D, DEPTH):
        h, w = hidden.load([token, d]), head.load([row, d])
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w.T, z, input_precision="tf32x3")
        if PAIR:
            w = head.load([row + ROWS, d])
            if WIDEN:
                w = w.to(tl.float32)
            beside = tl.dot(h, w.T, beside, input_precision="tf32x3")
    return z * scale, beside * scale


@triton.jit
def place(token_tiles, parts):
    """Which token tile and which part of the rows this program has: `TOKEN_GROUP` token tiles, then the next part, then on."""
    program = tl.program_id(0)
    group = program // (TOKEN_GROUP * parts)
    first = group * TOKEN_GROUP
    size = tl.minimum(TOKEN_GROUP, token_tiles - first)
    within = program - first * parts
    return first + within % size, within // size


@triton.jit
def log_sum_parts(z):
    """(m, sum of e^{z - m}) of each row of a tile; (LOG_ZERO, 0) where nothing counts."""
    top = tl.max(z, 1)
    total = tl.sum(tl.exp(z - top[:, None]), 1)
    return top, tl.where(top > LOG_ZERO, total, 0.0)


@triton.jit
def add_log_sums(top, total, more_top, more_total):
    """Two pairs of `log_sum_parts` as one."""
    new = tl.maximum(top, more_top)
    return new, total * tl.exp(top - new) + more_total * tl.exp(more_top - new)


# -------------------------------------------------------------------------------------------------------- on the host
def deal(num_tokens: int, num_rows: int, tiles: Tiles, device: torch.device) -> tuple[int, int, int]:
    """Tiles of tokens, parts that the rows are dealt to, and steps of a part; parts is 0 where nothing is to be done."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    token_tiles, steps = triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(num_rows, tiles.step_rows)
    if not token_tiles * steps:
        return token_tiles, 0, 0
    per_part = triton.cdiv(steps, min(steps, triton.cdiv(WAVES * processors, token_tiles)))
    return token_tiles, triton.cdiv(steps, per_part), per_part


def head_gradients(
    write_dlogits: Callable[[torch.Tensor, int], None],
    hidden_TD: torch.Tensor,
    rows_vD: torch.Tensor,
    step_rows: int,
    grad_rows_vD: torch.Tensor | None,
    need_hidden: bool,
) -> torch.Tensor | None:
    """This rank's share of the hidden states' gradient, [T, D] float32; the gradient of the rows is added to `grad_rows_vD`.

    `write_dlogits(dz_Tb, first)` fills [T, b] with the gradient of the logits of the rows from `first` on, temperature included.
    """
    num_tokens, num_rows = hidden_TD.shape[0], rows_vD.shape[0]
    grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=wide(hidden_TD.dtype)) if need_hidden else None
    if not num_tokens * num_rows:
        return grad_hidden_TD
    fit = WORKSPACE_BYTES // (num_tokens * rows_vD.element_size() * step_rows)
    block = min(max(1, fit), triton.cdiv(num_rows, step_rows)) * step_rows
    workspace = hidden_TD.new_empty(num_tokens * block, dtype=rows_vD.dtype)
    for first in range(0, num_rows, block):
        rows_bD = rows_vD[first : first + block]
        width = triton.cdiv(rows_bD.shape[0], step_rows) * step_rows  # whole steps; what lies past the last row is not read
        dz_Tb = workspace[: num_tokens * width].view(num_tokens, width)
        write_dlogits(dz_Tb, first)
        dz_Tb = dz_Tb[:, : rows_bD.shape[0]]
        if grad_hidden_TD is not None:
            grad_hidden_TD += matmul(dz_Tb, rows_bD)
        if grad_rows_vD is not None:
            grad_rows_vD[first : first + block] += matmul(dz_Tb.t(), hidden_TD)
    return grad_hidden_TD
