"""Logits of a few tokens on this rank's rows of the vocabulary, and the collectives that make the shards one distribution.

Knows sharding, padding and which targets count; refuses to know what the logits are for.

Two sizes are at work: a chunk of tokens is what matrix products are made of, a stripe of its rows what a cache holds while
the passes over it go on in float32. Between them logits rest as the matrix unit leaves them.

Dimension key: T packed targets, C tokens of one chunk, r tokens of one stripe, D hidden size, v vocabulary rows of this rank
without padding, N models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch
import torch.distributed as dist

from megatron_opd.kernels.products import TORCH, HeadProducts, Owner, Products, matmul, wide
from megatron_opd.types import VocabShard

Implementation = Literal["reference", "chunked", "triton", "te"]  # of one rank's own work
Model = tuple[torch.Tensor, torch.Tensor]  # hidden states [T, D] of the targets that count, true rows [v, D] of the head

LOG_ZERO = -1e30  # stands for log 0 in maxima: unlike -inf it can be subtracted from itself
STRIPE = {"cpu": 1 << 17, "cuda": 1 << 25}  # logits of one stripe: what a cache holds, or few launches
SEGMENT = 128  # columns whose maximum is taken first where the column of a row's maximum is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which logits are computed, and how many at a time."""

    shard: VocabShard
    kept: torch.Tensor | None  # int64 indices of the targets that count; None: all
    temperature: float  # divides the logits
    chunk_tokens: int  # tokens whose logits exist at a time
    implementation: Implementation = "chunked"
    products: Products = TORCH


# ------------------------------------------------------------------------------------------------- rows and targets
def true_rows(head: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """`head` [stop - start, D] without its padding rows -> [v, D], a view; v is 0 on a rank that holds padding only."""
    assert head.shape[0] == shard.stop - shard.start, f"the head has {head.shape[0]} rows, its shard [{shard.start}, {shard.stop})"
    return head[: max(0, min(shard.stop, shard.vocab_size) - shard.start)]


def gather_tokens(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """All tokens [T, D] on every rank, from [T / tp, D] when the sequence is split."""
    if shard.group is None or not shard.sequence_parallel:
        return hidden
    gathered = hidden.new_empty(count_targets(hidden, shard), hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=shard.group)
    return gathered


def reduce_tokens(grad_TD: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The transpose of `gather_tokens` for partial gradients: summed over the ranks, split as the tokens came."""
    if shard.group is None:
        return grad_TD
    if not shard.sequence_parallel:
        dist.all_reduce(grad_TD, group=shard.group)
        return grad_TD
    own = grad_TD.new_empty(grad_TD.shape[0] // shard.group.size(), grad_TD.shape[1])
    dist.reduce_scatter_tensor(own, grad_TD, group=shard.group)
    return own


def count_targets(hidden: torch.Tensor, shard: VocabShard) -> int:
    """T, from hidden states that may be split over the ranks."""
    return hidden.shape[0] * (shard.group.size() if shard.group is not None and shard.sequence_parallel else 1)


def kept_tokens(hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The hidden states of the targets that count, from all ranks of a split sequence; from here on T counts only them."""
    hidden_TD = gather_tokens(hidden, plan.shard)
    return hidden_TD if plan.kept is None else hidden_TD[plan.kept]


def all_targets(kept: torch.Tensor | None, plan: Plan, num_targets: int) -> torch.Tensor | None:
    """The transpose of the choice in `kept_tokens`, differentiable: 0 for the targets that do not count. None stays None."""
    if kept is None or plan.kept is None:
        return kept
    return kept.new_zeros(num_targets, *kept.shape[1:]).index_copy(0, plan.kept, kept)


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Consecutive slices of at most `chunk_tokens` that cover all tokens."""
    return [slice(first, min(first + chunk_tokens, num_tokens)) for first in range(0, num_tokens, chunk_tokens)]


# ------------------------------------------------------------------------------------------------ logits, their sums
def logits(hidden_CD: torch.Tensor, rows_vD: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, v] float32 (float64), a fresh tensor that may be written to."""
    return matmul(hidden_CD, rows_vD.t()).to(wide(hidden_CD.dtype)).div_(temperature)


def head_products(models: Sequence[Model], plan: Plan) -> list[HeadProducts]:
    """What multiplies with the head of the student, and of a teacher if there is one."""
    owners: tuple[Owner, ...] = ("student", "teacher")
    return [plan.products.head(rows, owner) for (_, rows), owner in zip(models, owners)]


def chunk_logits(
    models: Sequence[Model], heads: Sequence[HeadProducts], plan: Plan, *, alive: int = 1
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """The logits [C, v] of each model, chunk by chunk, as `plan.products` leaves them and before the temperature; the chunk that is
    `alive` further on takes their place.
    """
    num_tokens = models[0][0].shape[0]
    size = min(plan.chunk_tokens, num_tokens)
    places = [[h.new_empty(size, rows.shape[0], dtype=plan.products.dtype(h)) for h, rows in models] for _ in range(alive)]
    for c, place_N in zip(chunks(num_tokens, plan.chunk_tokens), cycle(places)):
        yield c, [head.logits(h[c], place[: c.stop - c.start]) for (h, _), head, place in zip(models, heads, place_N)]


def stripes(logits_NCv: Sequence[torch.Tensor], plan: Plan, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a chunk and their logits / temperature [N, r, v] in `dtype`, to be written to; the next stripe takes their place."""
    num_tokens, num_rows = logits_NCv[0].shape
    size = max(1, min(STRIPE[logits_NCv[0].device.type] // max(1, num_rows), num_tokens))
    place = logits_NCv[0].new_empty(len(logits_NCv), size, num_rows, dtype=dtype)
    for r in chunks(num_tokens, size) if num_rows else []:
        x_Nrv = place[:, : r.stop - r.start]
        for x_rv, z_Cv in zip(x_Nrv, logits_NCv):
            x_rv.copy_(z_Cv[r])
        yield r, x_Nrv if plan.temperature == 1 else x_Nrv.div_(plan.temperature)


def largest_in_row(x_rv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each row and its column, of equal ones the lowest: `x.max(-1)` in a third of its time."""
    whole = x_rv.shape[1] // SEGMENT * SEGMENT
    if not whole:
        return x_rv.max(-1)
    segments = [x_rv[:, :whole].unflatten(1, (-1, SEGMENT)).amax(-1)]
    if whole < x_rv.shape[1]:
        segments.append(x_rv[:, whole:].amax(-1, keepdim=True))
    max_r, segment_r = torch.cat(segments, 1).max(-1)
    first_r1 = (segment_r * SEGMENT).clamp_max_(x_rv.shape[1] - SEGMENT)[:, None]  # columns before the last segment hold less
    window_rS = x_rv.gather(1, first_r1 + torch.arange(SEGMENT, device=x_rv.device))
    return max_r, first_r1[:, 0] + window_rS.max(-1).indices


def log_sum_parts(logits_Cv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's (m [C], sum of exp(z - m) [C]); (LOG_ZERO, 0) where nothing counts."""
    max_C = logits_Cv.amax(-1)
    sum_C = (logits_Cv - max_C[:, None]).exp_().sum(-1)
    return max_C, sum_C.masked_fill_(max_C <= LOG_ZERO, 0)


def add_up(partial: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The sum over the ranks, in place."""
    if shard.group is not None:
        dist.all_reduce(partial, group=shard.group)
    return partial


def largest(max_local: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The maximum over the ranks. Sums under the local one times exp(local - largest) are then ready to be added up."""
    max_all = max_local.clone()
    if shard.group is not None:
        dist.all_reduce(max_all, dist.ReduceOp.MAX, group=shard.group)
    return max_all


def best_ids(best_local: torch.Tensor, max_local: torch.Tensor, max_all: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The id of the largest logit over the ranks, of equal ones the lowest, from each rank's own."""
    best = best_local.masked_fill(max_local < max_all, shard.vocab_size)
    if shard.group is not None:
        dist.all_reduce(best, dist.ReduceOp.MIN, group=shard.group)
    return best


def side_by_side(own: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """What each rank has, stacked along a new first dimension [tp, ...]."""
    return side_by_side_soon(own, shard)()


def side_by_side_soon(own: torch.Tensor, shard: VocabShard) -> Callable[[], torch.Tensor]:
    """The same under way; what is returned waits for it."""
    if shard.group is None:
        return lambda: own[None]
    own = own.contiguous()
    gathered = own.new_empty(shard.group.size() * own.shape[0], *own.shape[1:])
    work = dist.all_gather_into_tensor(gathered, own, group=shard.group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return gathered.unflatten(0, (shard.group.size(), -1))

    return wait


# --------------------------------------------------------------------------------------------------------- gradients
class HeadGradients:
    """Gradients of hidden states and head from those of logits, added up in float32 (float64) chunk by chunk."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        products: HeadProducts,
        head: torch.Tensor,
        plan: Plan,
        needs: Sequence[bool],
        head_sum: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """`needs` tells which of (hidden, head) is wanted; `head_sum` is where the head's is added to, zeros of its own if None; `scale`
        is of all that is added.
        """
        self._given_TD, self._products, self._plan, self._scale = hidden_TD, products, plan, scale
        self._hidden_TD = torch.zeros_like(hidden_TD, dtype=wide(hidden_TD.dtype)) if needs[0] else None
        self._head = (torch.zeros_like(head, dtype=wide(head.dtype)) if head_sum is None else head_sum) if needs[1] else None

    def add(self, c: slice, dz_Cv: torch.Tensor) -> None:
        """What follows from the gradient of the logits / temperature of one chunk."""
        of_hidden = None if self._hidden_TD is None else self._hidden_TD[c]
        of_rows = None if self._head is None else true_rows(self._head, self._plan.shard)
        self._products.add_gradients(dz_Cv, self._given_TD[c], of_hidden, of_rows, self._scale / self._plan.temperature)

    def finish(self, hidden: torch.Tensor, head: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What backward returns for `hidden` and `head`: `scale` times the sums, of all ranks where it is about tokens."""
        grad_TD = None if self._hidden_TD is None else self._hidden_TD * scale
        return tokens_back(grad_TD, hidden, self._plan), None if self._head is None else hand_over(self._head, head, scale)


def tokens_back(grad_TD: torch.Tensor | None, hidden: torch.Tensor, plan: Plan) -> torch.Tensor | None:
    """What backward returns for `hidden`, from this rank's share of the gradient of the targets that count. None stays None."""
    whole_TD = all_targets(grad_TD, plan, count_targets(hidden, plan.shard))
    return None if whole_TD is None else reduce_tokens(whole_TD, plan.shard).to(hidden.dtype)


def main_grad(head: torch.Tensor) -> torch.Tensor | None:
    """Where Megatron's data parallelism adds up the gradient of `head` over micro-batches, if it does so in the dtype that sums need."""
    main = getattr(head, "main_grad", None) if hasattr(head, "grad_added_to_main_grad") else None
    return main if main is not None and main.dtype == wide(head.dtype) else None


def hand_over(sum_vD: torch.Tensor, head: torch.Tensor, scale: float) -> torch.Tensor | None:
    """What backward returns for `head`: `scale` times the sum, or what Megatron expects when that is in `main_grad` already.

    There the hook on `head` passes over the returned gradient and looks only whether there is one, unless the head is tied to
    the embedding (`zero_out_wgrad`): then it adds what it gets, which must be the embedding's gradient alone.
    """
    main = main_grad(head)
    if main is None:
        return sum_vD.to(head.dtype) if scale == 1 else torch.mul(sum_vD, scale).to(head.dtype)
    if sum_vD is not main:
        main.add_(sum_vD, alpha=scale)
    head.grad_added_to_main_grad = True
    return None if getattr(head, "zero_out_wgrad", False) else torch.empty_like(head)


def head_backward(
    dlogits: Callable[[slice, torch.Tensor], torch.Tensor],
    teachers: Sequence[Model],
    hidden: torch.Tensor,
    head: torch.Tensor,
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What backward returns for `hidden` and `head`, None where `needs` says so; the logits are computed anew.

    `dlogits` makes the gradient [r, v] of a stripe's logits / temperature from its slice of the targets that count and those
    logits of student and teachers [1 + len(teachers), r, v], which it may write to.
    """
    student = kept_tokens(hidden, plan), true_rows(head, plan.shard)
    models = [student, *teachers]
    heads = head_products(models, plan)
    gradients = HeadGradients(student[0], heads[0], head, plan, needs, main_grad(head))
    for c, logits_NCv in chunk_logits(models, heads, plan):
        for r, x_Nrv in stripes(logits_NCv, plan, wide(hidden.dtype)):
            logits_NCv[0][r] = dlogits(slice(c.start + r.start, c.start + r.stop), x_Nrv)
        gradients.add(c, logits_NCv[0])
    return gradients.finish(hidden, head)


def local_backward(
    local: Callable[[Model, torch.Tensor | None, bool], torch.Tensor | None],
    hidden: torch.Tensor,
    head: torch.Tensor,
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same as `head_backward` where one call does a rank's work: `local` adds to the gradient [v, D] of the head's true rows, if
    it is wanted, and returns that of the hidden states [T, D], if it is.
    """
    head_sum = None
    if needs[1]:
        main = main_grad(head)
        head_sum = torch.zeros_like(head, dtype=wide(head.dtype)) if main is None else main
    rows_sum = None if head_sum is None else true_rows(head_sum, plan.shard)
    grad_TD = local((kept_tokens(hidden, plan), true_rows(head, plan.shard)), rows_sum, needs[0])
    return tokens_back(grad_TD, hidden, plan), None if head_sum is None else hand_over(head_sum, head, 1.0)
