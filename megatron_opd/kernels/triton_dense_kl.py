"""One rank's share of `dense_kl` in Triton: the sums of its forward passes and the gradients of its backward pass.

Knows one rank's rows alone; the collectives in between are `dense_kl`'s own, and so are the formulas. The logits of both models meet
in a pair of tiles, so a tile has fewer rows than that of `logps`: two float32 accumulators share the registers of one.

Dimension key: T tokens, D hidden size of the student, E of the teacher, v vocabulary rows of this rank, P parts that the rows are
dealt to, b rows of one block; [T, 2] is (student, teacher).
"""

# ruff: noqa: ANN001, ANN201 - arguments of kernels have types of Triton's own

import math

import torch
import triton
import triton.language as tl

from megatron_opd.kernels.triton_logits import LOG_ZERO, Tiles, deal, head_gradients, logit_tiles, place
from megatron_opd.types import Divergence, VocabShard

NARROW = Tiles(tokens=128, rows=128, depth=64, warps=8, stages=3)  # 16-bit inputs
FLOAT32 = Tiles(tokens=64, rows=64, depth=32, warps=4, stages=3)

Model = tuple[torch.Tensor, torch.Tensor]  # hidden states, rows of the head


def tiles_for(student: torch.dtype, teacher: torch.dtype) -> Tiles:
    """The tiles of every pass."""
    return FLOAT32 if torch.float32 in (student, teacher) else NARROW


# ---------------------------------------------------------------------------------------------------------- on the chip
@triton.jit
def both_tiles(
    hidden, head, teacher, teacher_head, token, row, num_rows, scale,
    D: tl.constexpr, E: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of logits of the student, and of the teacher; LOG_ZERO past the last row."""
    z, _ = logit_tiles(hidden, head, token, row, scale, D, TOKENS, ROWS, DEPTH, False, WIDEN)
    u, _ = logit_tiles(teacher, teacher_head, token, row, scale, E, TOKENS, ROWS, DEPTH, False, WIDEN)
    real = tl.arange(0, ROWS)[None, :] < num_rows - row
    return tl.where(real, z, LOG_ZERO), tl.where(real, u, LOG_ZERO)


@triton.jit
def halves(x):
    """The columns of a tile in two, 16 by 16 in turn. Either chip holds both in one thread, so that nothing moves, and what is computed
    from one at a time fits beside both tiles of logits.
    """
    TOKENS: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1]
    one, other = tl.split(tl.permute(tl.reshape(x, (TOKENS, ROWS // 32, 2, 16)), (0, 1, 3, 2)))
    return tl.reshape(one, (TOKENS, ROWS // 2)), tl.reshape(other, (TOKENS, ROWS // 2))


@triton.jit
def quarters(x):
    """The halves of the halves."""
    one, other = halves(x)
    first, second = halves(one)
    third, fourth = halves(other)
    return first, second, third, fourth


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def lower_best(top, best, more_top, more_best):
    """The row of the larger maximum, of equal ones the lower."""
    best = tl.where(more_top == top, tl.minimum(best, more_best), best)
    return tl.where(more_top > top, more_best, best)


@triton.jit
def add_moved(total, moment, gap, shift, gap_shift, more_total, more_moment, more_gap, more_shift, more_gap_shift):
    """Sums of e^x, e^x x and e^x (z - u) of two sets of rows, each moved by the shift of its maximum, as one."""
    factor, more_factor = tl.exp(shift), tl.exp(more_shift)
    return (
        factor * total + more_factor * more_total,
        factor * (moment + shift * total) + more_factor * (more_moment + more_shift * more_total),
        factor * (gap + gap_shift * total) + more_factor * (more_gap + more_gap_shift * more_total),
    )


@triton.jit
def sums_kernel(
    hidden, head, teacher, teacher_head, sums_ptr, best_ptr,
    num_tokens, num_rows, scale, token_tiles, parts, per_part,
    D: tl.constexpr, E: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of e^x, e^x x and e^x (z - u) of both models, [P, 4, 2, T], and both best rows, [P, 2, T], for one tile of tokens."""
    tl.static_assert(not PAIR)
    token_tile, part = place(token_tiles, parts)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    zero = tl.zeros((TOKENS,), tl.float32)
    top_z, total_z, moment_z, gap_z, best_z = zero + LOG_ZERO, zero, zero, zero, tl.zeros((TOKENS,), tl.int32)
    top_u, total_u, moment_u, gap_u, best_u = top_z, zero, zero, zero, best_z
    columns = tl.arange(0, ROWS // 2)[None, :] % 16 + tl.arange(0, ROWS // 2)[None, :] // 16 * 32  # of the first half

    for tile in tl.range(part * per_part, tl.minimum((part + 1) * per_part, tl.cdiv(num_rows, ROWS)), disable_licm=True):
        z, u = both_tiles(
            hidden, head, teacher, teacher_head, token_tile * TOKENS, tile * ROWS, num_rows, scale, D, E, TOKENS, ROWS, DEPTH, WIDEN
        )
        z_parts, u_parts = halves(z), halves(u)
        for i in tl.static_range(2):
            z, u, row = z_parts[i], u_parts[i], tile * ROWS + i * 16
            tile_top_z, tile_top_u = tl.max(z, 1), tl.max(u, 1)
            z -= tile_top_z[:, None]
            u -= tile_top_u[:, None]
            best_z = lower_best(top_z, best_z, tile_top_z, row + tl.min(tl.where(z == 0.0, columns, ROWS), 1))
            best_u = lower_best(top_u, best_u, tile_top_u, row + tl.min(tl.where(u == 0.0, columns, ROWS), 1))
            new_z, new_u = tl.maximum(top_z, tile_top_z), tl.maximum(top_u, tile_top_u)
            shift_z, shift_u, tile_shift_z, tile_shift_u = top_z - new_z, top_u - new_u, tile_top_z - new_z, tile_top_u - new_u
            gap_shift, tile_gap_shift = shift_z - shift_u, tile_shift_z - tile_shift_u

            exp = tl.exp(z)
            total_z, moment_z, gap_z = add_moved(
                total_z, moment_z, gap_z, shift_z, gap_shift,
                tl.sum(exp, 1), tl.sum(exp * z, 1), tl.sum(exp * (z - u), 1), tile_shift_z, tile_gap_shift,
            )  # fmt: skip
            exp = tl.exp(u)
            total_u, moment_u, gap_u = add_moved(
                total_u, moment_u, gap_u, shift_u, gap_shift,
                tl.sum(exp, 1), tl.sum(exp * u, 1), tl.sum(exp * (z - u), 1), tile_shift_u, tile_gap_shift,
            )  # fmt: skip
            top_z, top_u = new_z, new_u

    real = tokens < num_tokens
    out = sums_ptr + part * 8 * num_tokens + tokens
    tl.store(out, top_z, mask=real)
    tl.store(out + num_tokens, top_u, mask=real)
    tl.store(out + 2 * num_tokens, total_z, mask=real)
    tl.store(out + 3 * num_tokens, total_u, mask=real)
    tl.store(out + 4 * num_tokens, moment_z, mask=real)
    tl.store(out + 5 * num_tokens, moment_u, mask=real)
    tl.store(out + 6 * num_tokens, gap_z, mask=real)
    tl.store(out + 7 * num_tokens, gap_u, mask=real)
    tl.store(best_ptr + part * 2 * num_tokens + tokens, best_z, mask=real)
    tl.store(best_ptr + (part * 2 + 1) * num_tokens + tokens, best_u, mask=real)


@triton.jit
def mixture_kernel(
    hidden, head, teacher, teacher_head, norm_ptr, kl_ptr,
    num_tokens, num_rows, scale, log_beta, log_rest, token_tiles, parts, per_part,
    D: tl.constexpr, E: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One part's share of KL(p||m) and KL(q||m), [P, 2, T], for one tile of tokens; log m / p = log (1 - beta) + softplus(odds)."""
    tl.static_assert(not PAIR)
    token_tile, part = place(token_tiles, parts)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = tokens < num_tokens
    kl_p, kl_q = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    for tile in tl.range(part * per_part, tl.minimum((part + 1) * per_part, tl.cdiv(num_rows, ROWS)), disable_licm=True):
        z, u = both_tiles(
            hidden, head, teacher, teacher_head, token_tile * TOKENS, tile * ROWS, num_rows, scale, D, E, TOKENS, ROWS, DEPTH, WIDEN
        )
        z_parts, u_parts = quarters(z), quarters(u)
        for i in tl.static_range(4):
            logp = z_parts[i] - tl.load(norm_ptr + tokens * 2, mask=real, other=0.0)[:, None]
            logq = u_parts[i] - tl.load(norm_ptr + tokens * 2 + 1, mask=real, other=0.0)[:, None]
            odds = (logq - logp) + (log_beta - log_rest)  # log of beta q over (1 - beta) p
            kl_p -= tl.sum(tl.exp(logp) * (log_rest + softplus(odds)), 1)
            kl_q -= tl.sum(tl.exp(logq) * (log_beta + softplus(-odds)), 1)
    tl.store(kl_ptr + part * 2 * num_tokens + tokens, kl_p, mask=real)
    tl.store(kl_ptr + (part * 2 + 1) * num_tokens + tokens, kl_q, mask=real)


@triton.jit
def dlogits_kernel(
    hidden, head, teacher, teacher_head, norm_ptr, mean_ptr, grad_ptr, dz_ptr,
    num_tokens, num_rows, scale, weight, log_beta, log_rest, token_tiles, first_step, block_steps,
    D: tl.constexpr, E: tl.constexpr, JSD: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PAIR: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of the student's logits, into a block of rows. `weight`: beta of JSD, else the share of KL(q||p)."""
    tl.static_assert(not PAIR)
    token_tile, step = place(token_tiles, block_steps)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    real = tokens < num_tokens
    z, u = both_tiles(
        hidden, head, teacher, teacher_head, token_tile * TOKENS, (first_step + step) * ROWS, num_rows, scale,
        D, E, TOKENS, ROWS, DEPTH, WIDEN,
    )  # fmt: skip
    logp = z - tl.load(norm_ptr + tokens * 2, mask=real, other=0.0)[:, None]
    logq = u - tl.load(norm_ptr + tokens * 2 + 1, mask=real, other=0.0)[:, None]
    mean = tl.load(mean_ptr + tokens, mask=real, other=0.0)[:, None]
    if JSD:
        dz = tl.exp(logp) * (log_rest + softplus((logq - logp) + (log_beta - log_rest)) + mean) * (weight - 1.0)
    else:
        dz = tl.exp(logp) * ((logp - logq - mean) * (1.0 - weight) + weight) - tl.exp(logq) * weight
    dz *= tl.load(grad_ptr + tokens, mask=real, other=0.0)[:, None]
    dz_ptrs = dz_ptr + tokens[:, None].to(tl.int64) * (block_steps * ROWS) + step * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=real[:, None])


# -------------------------------------------------------------------------------------------------------- on the host
def _read(student: Model, teacher: Model, tiles: Tiles) -> list[triton.tools.tensor_descriptor.TensorDescriptor]:
    return [tiles.of(matrix, extent) for model in (student, teacher) for matrix, extent in zip(model, (tiles.tokens, tiles.rows))]


def local_sums(student: Model, teacher: Model, shard: VocabShard, temperature: float) -> tuple[torch.Tensor, ...]:
    """What this rank knows of each token before the ranks speak, each [T, 2].

    Returns the largest logit, LOG_ZERO where there is none; with x the logits less that maximum, the sums of e^x, of e^x x, and of
    e^x times the gap between the student's x and the teacher's; the id of the largest logit, of equal ones the lowest.
    """
    (num_tokens, depth), (num_rows, teacher_depth) = student[0].shape, teacher[1].shape
    tiles = tiles_for(student[1].dtype, teacher[1].dtype)
    token_tiles, parts, per_part = deal(num_tokens, num_rows, tiles, student[1].device)
    if not parts:
        max_T2 = student[1].new_full((num_tokens, 2), LOG_ZERO.value, dtype=torch.float32)
        return max_T2, *torch.zeros_like(max_T2).expand(3, -1, -1).clone(), torch.zeros_like(max_T2, dtype=torch.int64)
    sums_PXT = student[1].new_empty(parts, 4, 2, num_tokens, dtype=torch.float32)
    best_PT = student[1].new_empty(parts, 2, num_tokens, dtype=torch.int32)
    sums_kernel[(token_tiles * parts,)](
        *_read(student, teacher, tiles), sums_PXT, best_PT, num_tokens, num_rows, 1 / temperature, token_tiles, parts, per_part,
        D=depth, E=teacher_depth, **tiles.constants(),
    )  # fmt: skip
    max_PT, sum_PT, moment_PT, gap_PT = sums_PXT.unbind(1)  # each [P, 2, T]
    max_T = max_PT.amax(0)
    shift_PT = max_PT - max_T
    moment_PT, gap_PT = moment_PT + shift_PT * sum_PT, gap_PT + (shift_PT[:, :1] - shift_PT[:, 1:]) * sum_PT
    sums = [(one_PT * shift_PT.exp()).sum(0).t().contiguous() for one_PT in (sum_PT, moment_PT, gap_PT)]
    best_T = best_PT.masked_fill(max_PT < max_T, torch.iinfo(torch.int32).max).amin(0)
    return max_T.t().contiguous(), *sums, (best_T.long() + shard.start).t().contiguous()


def local_to_mixture(student: Model, teacher: Model, norm_T2: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """This rank's share [T, 2] of KL(p||m) and KL(q||m), from the norms over all ranks."""
    (num_tokens, depth), (num_rows, teacher_depth) = student[0].shape, teacher[1].shape
    tiles = tiles_for(student[1].dtype, teacher[1].dtype)
    token_tiles, parts, per_part = deal(num_tokens, num_rows, tiles, student[1].device)
    kl_PT = norm_T2.new_zeros(parts, 2, num_tokens)
    if parts:
        mixture_kernel[(token_tiles * parts,)](
            *_read(student, teacher, tiles), norm_T2.contiguous(), kl_PT, num_tokens, num_rows, 1 / temperature,
            math.log(beta), math.log1p(-beta), token_tiles, parts, per_part, D=depth, E=teacher_depth, **tiles.constants(),
        )  # fmt: skip
    return kl_PT.sum(0).t().contiguous()


def local_gradients(
    student: Model, teacher: Model, norm_T2: torch.Tensor, mean_T: torch.Tensor, grad_T: torch.Tensor, divergence: Divergence,
    temperature: float, grad_rows_vD: torch.Tensor | None, need_hidden: bool,
) -> torch.Tensor | None:  # fmt: skip
    """This rank's share of the hidden states' gradient, [T, D] float32; that of the head is added to `grad_rows_vD`.

    `mean_T` is KL(p||m) of a Jensen-Shannon divergence, else KL(p||q), over all ranks.
    """
    (num_tokens, depth), (num_rows, teacher_depth) = student[0].shape, teacher[1].shape
    tiles = tiles_for(student[1].dtype, teacher[1].dtype)
    norm_T2, mean_T, grad_T = norm_T2.contiguous(), mean_T.contiguous(), (grad_T / temperature).float().contiguous()
    jsd = divergence.kind == "jsd"
    weight = {"forward": 1.0, "reverse": 0.0}.get(divergence.kind, divergence.weight)
    log_beta, log_rest = (math.log(weight), math.log1p(-weight)) if jsd else (0.0, 0.0)

    def write_dlogits(dz_Tb: torch.Tensor, first: int) -> None:
        token_tiles, block_steps = triton.cdiv(num_tokens, tiles.tokens), dz_Tb.shape[1] // tiles.step_rows
        dlogits_kernel[(token_tiles * block_steps,)](
            *_read(student, teacher, tiles), norm_T2, mean_T, grad_T, dz_Tb, num_tokens, num_rows, 1 / temperature,
            weight, log_beta, log_rest, token_tiles, first // tiles.step_rows, block_steps,
            D=depth, E=teacher_depth, JSD=jsd, **tiles.constants(),
        )  # fmt: skip

    return head_gradients(write_dlogits, *student, tiles.step_rows, grad_rows_vD, need_hidden)
