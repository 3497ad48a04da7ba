"""One rank's share of `logps` in Triton: the sums of a forward pass and the gradients of a backward pass.

Knows one rank's rows alone; the collectives between the two are `logps`'s own. The ids of a token come sorted, so that a tile
visits those that lie in its rows and no others. What a rest leaves out is struck from the tile before its sum is taken. The
gradient of a logit is one smooth function of it but at the ids, so a tile is filled as if there were none, then theirs, few
numbers that plain tensors hold, are written over it.

Dimension key: T tokens, D hidden size, v vocabulary rows of this rank, K ids per token, N rests, M = 1 + N (all rows, then the
rests), P parts that the rows are dealt to, b rows of one block.
"""

# ruff: noqa: ANN001, ANN201 - arguments of kernels have types of Triton's own

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megatron_opd.kernels.triton_logits import LOG_ZERO, Tiles, add_log_sums, deal, head_gradients, log_sum_parts, logit_tiles, place
from megatron_opd.types import VocabShard

NARROW = Tiles(tokens=128, rows=128, depth=64, pair=True, warps=8, stages=3)  # 16-bit inputs
MANY_RESTS = Tiles(tokens=128, rows=128, depth=64, warps=8, stages=3)  # a tile is kept beside the one that a rest strikes from
FLOAT32 = Tiles(tokens=64, rows=64, depth=32, warps=4, stages=3)


def tiles_for(dtype: torch.dtype, num_rests: int) -> Tiles:
    """The tiles of either pass."""
    if dtype == torch.float32:
        return FLOAT32
    return NARROW if num_rests <= 1 else MANY_RESTS


# ---------------------------------------------------------------------------------------------------------- on the chip
@triton.jit
def sums_kernel(
    hidden, head, ids_ptr, struck_ptr, offsets_ptr, picked_ptr, max_ptr, sum_ptr, moment_ptr, best_ptr,
    num_tokens, num_rows, scale, K, token_tiles, parts, per_part,
    D: tl.constexpr, N: tl.constexpr, N2: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sums [P, T, M] over the rows of one part for one tile of tokens, and the logits at the ids within.

    A duplicate of an id that has been struck finds LOG_ZERO in its place: only the first of equal ids is right. Nothing is hoisted
    out of the loop: the column numbers of a tile would hold registers that the tile wants.
    """
    token_tile, part = place(token_tiles, parts)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = tokens < num_tokens
    steps = tl.cdiv(num_rows, ROWS * (1 + PAIR))
    top, total = tl.full((TOKENS,), LOG_ZERO, tl.float32), tl.zeros((TOKENS,), tl.float32)
    moment, best = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.int32)
    rest = tl.arange(0, N2)[None, :]
    rest_top, rest_total = tl.full((TOKENS, N2), LOG_ZERO, tl.float32), tl.zeros((TOKENS, N2), tl.float32)
    rows = tl.arange(0, ROWS)[None, :]

    for step in tl.range(part * per_part, tl.minimum((part + 1) * per_part, steps), disable_licm=True):
        zs = logit_tiles(hidden, head, token_tile * TOKENS, step * (1 + PAIR) * ROWS, scale, D, TOKENS, ROWS, DEPTH, PAIR, WIDEN)
        for side in tl.static_range(1 + PAIR):
            tile = step * (1 + PAIR) + side
            z = tl.where(rows < num_rows - tile * ROWS, zs[side], LOG_ZERO)

            tile_top, tile_total = log_sum_parts(z)
            tile_moment = tl.sum(tl.exp(z - tile_top[:, None]) * (z - tile_top[:, None]), 1)
            tile_best = tl.min(tl.where(z == tile_top[:, None], rows, ROWS), 1)
            best = tl.where(tile_top > top, tile * ROWS + tile_best, best)
            new = tl.maximum(top, tile_top)
            moment = tl.exp(top - new) * (moment + (top - new) * total)
            moment += tl.exp(tile_top - new) * (tile_moment + (tile_top - new) * tile_total)
            top, total = add_log_sums(top, total, tile_top, tile_total)

            first = tl.load(offsets_ptr + tokens * (steps * (1 + PAIR) + 1) + tile, mask=real, other=0)
            num_ids = tl.load(offsets_ptr + tokens * (steps * (1 + PAIR) + 1) + tile + 1, mask=real, other=0) - first
            for n in tl.static_range(N):
                x = z
                for i in range(0, tl.max(num_ids)):
                    slots = tokens * K + first + i
                    row = tl.load(ids_ptr + slots, mask=i < num_ids, other=-1) - tile * ROWS
                    hit = rows == row[:, None]
                    if n == 0:
                        tl.store(picked_ptr + slots, tl.sum(tl.where(hit, x, 0.0), 1), mask=i < num_ids)
                    struck = (tl.load(struck_ptr + slots, mask=i < num_ids, other=0) >> n) & 1
                    struck_row = tl.where(struck == 1, row, -1)
                    x = tl.where(rows == struck_row[:, None], LOG_ZERO, x)
                tile_top, tile_total = log_sum_parts(x)
                tile_top = tl.where(rest == n, tile_top[:, None], LOG_ZERO)
                tile_total = tl.where(rest == n, tile_total[:, None], 0.0)
                rest_top, rest_total = add_log_sums(rest_top, rest_total, tile_top, tile_total)

    out = part * num_tokens + tokens
    tl.store(max_ptr + out * (N + 1), top, mask=real)
    tl.store(sum_ptr + out * (N + 1), total, mask=real)
    tl.store(moment_ptr + out, moment, mask=real)
    tl.store(best_ptr + out, best, mask=real)
    rest_out, rest_real = out[:, None] * (N + 1) + 1 + rest, real[:, None] & (rest < N)
    tl.store(max_ptr + rest_out, rest_top, mask=rest_real)
    tl.store(sum_ptr + rest_out, rest_total, mask=rest_real)


@triton.jit
def dlogits_kernel(
    hidden, head, ids_ptr, offsets_ptr, at_ids_ptr, norm_ptr, weight_ptr, dz_ptr,
    num_tokens, num_rows, scale, K, token_tiles, first_step, block_steps,
    D: tl.constexpr, M: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of a few tiles of logits, sum_m weight_m e^{z - norm_m} but at the ids, into a block of rows."""
    token_tile, step = place(token_tiles, block_steps)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = tokens < num_tokens
    rows = tl.arange(0, ROWS)[None, :]
    offsets_ptr += tokens * (tl.cdiv(num_rows, ROWS * (1 + PAIR)) * (1 + PAIR) + 1)
    dz_ptr += tokens[:, None].to(tl.int64) * (block_steps * (1 + PAIR) * ROWS) + rows
    first_tile = (first_step + step) * (1 + PAIR)
    zs = logit_tiles(hidden, head, token_tile * TOKENS, first_tile * ROWS, scale, D, TOKENS, ROWS, DEPTH, PAIR, WIDEN)
    for side in tl.static_range(1 + PAIR):
        z, tile = zs[side], first_tile + side
        dz = tl.zeros((TOKENS, ROWS), tl.float32)
        for m in tl.static_range(M):
            norm = tl.load(norm_ptr + tokens * M + m, mask=real, other=0.0)
            weight = tl.load(weight_ptr + tokens * M + m, mask=real, other=0.0)
            dz += weight[:, None] * tl.exp(tl.minimum(z - norm[:, None], 0.0))  # only at an id is z above a norm

        first = tl.load(offsets_ptr + tile, mask=real, other=0)
        num_ids = tl.load(offsets_ptr + tile + 1, mask=real, other=0) - first
        for i in range(0, tl.max(num_ids)):
            slots = tokens * K + first + i
            row = tl.load(ids_ptr + slots, mask=i < num_ids, other=-1) - tile * ROWS
            at_id = tl.load(at_ids_ptr + slots, mask=i < num_ids, other=0.0)
            dz = tl.where(rows == row[:, None], at_id[:, None], dz)

        tl.store(dz_ptr + (step * (1 + PAIR) + side) * ROWS, dz.to(dz_ptr.dtype.element_ty), mask=real[:, None])


# -------------------------------------------------------------------------------------------------------- on the host
@dataclass(frozen=True, slots=True, kw_only=True)
class _SortedIds:
    """The ids of each token as rows of this rank, rising; those of other ranks stand before and behind all tiles."""

    rows_TK: torch.Tensor  # int32
    order_TK: torch.Tensor  # int64, the column each came from
    leader_TK: torch.Tensor  # int64, the first place that holds an equal id
    offsets: torch.Tensor  # [T, tiles + 1] int32, the first place at or past the start of each tile of rows

    @classmethod
    def of(cls, ids_TK: torch.Tensor, shard: VocabShard, num_rows: int, tiles: Tiles) -> "_SortedIds":
        rows_TK, order_TK = (ids_TK - shard.start).clamp(-1, num_rows).int().sort(dim=1, stable=True)
        places_TK = torch.arange(ids_TK.shape[1], device=ids_TK.device).expand(ids_TK.shape)
        new_TK = torch.ones_like(places_TK, dtype=torch.bool)
        new_TK[:, 1:] = rows_TK[:, 1:] != rows_TK[:, :-1]
        edges = torch.arange(0, num_rows + tiles.step_rows, tiles.rows, dtype=torch.int32, device=ids_TK.device)
        edges = edges[: triton.cdiv(num_rows, tiles.step_rows) * tiles.step_rows // tiles.rows + 1].clamp_(max=num_rows)
        return cls(
            rows_TK=rows_TK,
            order_TK=order_TK,
            leader_TK=(places_TK * new_TK).cummax(1).values,
            offsets=torch.searchsorted(rows_TK, edges.repeat(ids_TK.shape[0], 1), out_int32=True),
        )

    def struck_by(self, rests: Sequence[slice]) -> torch.Tensor:
        """[T, K] int32, bit n where the id stands in a column of rest n; other columns may hold the same id."""
        bits_K = torch.zeros(self.rows_TK.shape[1], dtype=torch.int32)
        for n, rest in enumerate(rests):
            bits_K[rest] |= 1 << n
        return bits_K.to(self.rows_TK.device)[self.order_TK]


def local_sums(
    hidden_TD: torch.Tensor, rows_vD: torch.Tensor, ids_TK: torch.Tensor, rests: Sequence[slice], shard: VocabShard, temperature: float
) -> tuple[torch.Tensor, ...]:
    """What this rank knows of each token before the ranks speak.

    Returns the logits [T, K] at the ids, 0 where another rank owns the id; the largest logit [T, M], LOG_ZERO where there is none;
    the sum [T, M] of e^{z - max}; the sum [T] of e^{z - max} (z - max) over all rows; the id [T] of the largest logit, of equal ones
    the lowest.
    """
    (num_tokens, num_ids), (num_rows, depth), num_rests = ids_TK.shape, rows_vD.shape, max(1, len(rests))
    tiles = tiles_for(rows_vD.dtype, num_rests)
    token_tiles, parts, per_part = deal(num_tokens, num_rows, tiles, rows_vD.device)
    max_PTM = rows_vD.new_zeros(parts, num_tokens, 1 + num_rests, dtype=torch.float32)  # a rest nobody asked for is left unused
    sum_PTM, moment_PT = torch.zeros_like(max_PTM), torch.zeros_like(max_PTM[:, :, 0])
    best_PT = torch.zeros_like(moment_PT, dtype=torch.int32)
    picked_TK = torch.zeros_like(ids_TK, dtype=torch.float32)
    if parts:
        ids = _SortedIds.of(ids_TK, shard, num_rows, tiles)
        sorted_TK = torch.zeros_like(picked_TK)
        sums_kernel[(token_tiles * parts,)](
            tiles.of(hidden_TD, tiles.tokens), tiles.of(rows_vD, tiles.rows), ids.rows_TK, ids.struck_by(rests), ids.offsets, sorted_TK,
            max_PTM, sum_PTM, moment_PT, best_PT, num_tokens, num_rows, 1 / temperature, num_ids, token_tiles, parts, per_part,
            D=depth, N=num_rests, N2=triton.next_power_of_2(num_rests), **tiles.constants(),
        )  # fmt: skip
        picked_TK.scatter_(1, ids.order_TK, sorted_TK.gather(1, ids.leader_TK))
    return picked_TK, *_over_parts(max_PTM[:, :, : 1 + len(rests)], sum_PTM[:, :, : 1 + len(rests)], moment_PT, best_PT, shard)


def _over_parts(
    max_PTM: torch.Tensor, sum_PTM: torch.Tensor, moment_PT: torch.Tensor, best_PT: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, ...]:
    """The sums of all parts, each moved to the largest logit of all; no parts leave what stands for nothing."""
    if not max_PTM.shape[0]:
        max_TM = max_PTM.new_full(max_PTM.shape[1:], LOG_ZERO.value)
        return max_TM, torch.zeros_like(max_TM), moment_PT.sum(0), best_PT.sum(0)
    max_TM = max_PTM.amax(0)
    shift_PTM = max_PTM - max_TM
    moment_T = ((moment_PT + shift_PTM[:, :, 0] * sum_PTM[:, :, 0]) * shift_PTM[:, :, 0].exp()).sum(0)
    best_T = best_PT.masked_fill(max_PTM[:, :, 0] < max_TM[:, 0], torch.iinfo(torch.int32).max).amin(0)
    return max_TM, (sum_PTM * shift_PTM.exp()).sum(0), moment_T, best_T.long() + shard.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Upstream:
    """What arrives at a backward pass, and what its forward pass kept, over all ranks."""

    logp_TK: torch.Tensor  # log p at the ids
    norm_TM: torch.Tensor  # log of the sum of e^z over all rows, then outside each rest
    grad_TK: torch.Tensor  # of the log-probabilities
    grad_TN: torch.Tensor  # of the log rests, 0 where a rest is empty


def local_gradients(
    hidden_TD: torch.Tensor, rows_vD: torch.Tensor, ids_TK: torch.Tensor, rests: Sequence[slice], up: Upstream, shard: VocabShard,
    temperature: float, grad_rows_vD: torch.Tensor | None, need_hidden: bool,
) -> torch.Tensor | None:  # fmt: skip
    """This rank's share of the hidden states' gradient, [T, D] float32; that of the head is added to `grad_rows_vD`."""
    num_rows, depth = rows_vD.shape
    tiles = tiles_for(rows_vD.dtype, len(rests))
    weight_TM = torch.cat([-(up.grad_TK.sum(1) + up.grad_TN.sum(1))[:, None], up.grad_TN], 1).float() / temperature
    norm_TM, ids = up.norm_TM.contiguous(), _SortedIds.of(ids_TK, shard, num_rows, tiles)
    at_ids_TK = _at_ids(ids, rests, up, weight_TM, temperature)

    def write_dlogits(dz_Tb: torch.Tensor, first: int) -> None:
        token_tiles, block_steps = triton.cdiv(dz_Tb.shape[0], tiles.tokens), dz_Tb.shape[1] // tiles.step_rows
        dlogits_kernel[(token_tiles * block_steps,)](
            tiles.of(hidden_TD, tiles.tokens), tiles.of(rows_vD, tiles.rows), ids.rows_TK, ids.offsets, at_ids_TK, norm_TM, weight_TM,
            dz_Tb, dz_Tb.shape[0], num_rows, 1 / temperature, ids_TK.shape[1], token_tiles, first // tiles.step_rows, block_steps,
            D=depth, M=1 + len(rests), **tiles.constants(),
        )  # fmt: skip

    return head_gradients(write_dlogits, hidden_TD, rows_vD, tiles.step_rows, grad_rows_vD, need_hidden)


def _at_ids(ids: _SortedIds, rests: Sequence[slice], up: Upstream, weight_TM: torch.Tensor, temperature: float) -> torch.Tensor:
    """The gradient [T, K] of the logit at each sorted id: what its own log-probability and those of its duplicates ask for, and its
    share in the sums that it is part of.
    """
    logit_TK, grad_TK = (x.gather(1, ids.order_TK).float() for x in (up.logp_TK + up.norm_TM[:, :1], up.grad_TK))
    at_ids_TK = torch.zeros_like(grad_TK).scatter_add_(1, ids.leader_TK, grad_TK).gather(1, ids.leader_TK) / temperature
    at_ids_TK += weight_TM[:, :1] * (logit_TK - up.norm_TM[:, :1]).exp()
    bits_TK = ids.struck_by(rests)
    for n in range(1, 1 + len(rests)):
        struck_TK = torch.zeros_like(bits_TK).scatter_add_(1, ids.leader_TK, bits_TK >> (n - 1) & 1).gather(1, ids.leader_TK)
        share_TK = (logit_TK - up.norm_TM[:, n : n + 1]).clamp_max_(0).exp_()  # above 0 only where struck
        at_ids_TK += (weight_TM[:, n : n + 1] * share_TK).masked_fill_(struck_TK > 0, 0)
    return at_ids_TK
