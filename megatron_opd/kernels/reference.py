"""The slow twins: full logits in plain autograd. What the kernels mean, for readers and tests.

On one rank they are functions of whole matrices; behind the doors, as the implementation "reference", every rank gathers the logits of
all and does the same.

Dimension key: T packed targets, K ids per target, D hidden size of the student, E of the teacher, V vocabulary, v rows of this rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_opd.kernels.logits import Plan, kept_tokens, side_by_side, tokens_back, true_rows
from megatron_opd.kernels.products import wide
from megatron_opd.kernels.results import EMPTY_REST, DenseKL, TokenLogps
from megatron_opd.types import Divergence, VocabShard


def reference_logps(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    ids_TK: torch.Tensor,
    *,
    rests: Sequence[slice] = (),
    moments: bool = False,
    temperature: float = 1.0,
) -> TokenLogps:
    """What `logps` gives; `head` holds no padding."""
    return logps_of(hidden_TD @ head_VD.t() / temperature, ids_TK, rests, moments)


def logps_of(z_TV: torch.Tensor, ids_TK: torch.Tensor, rests: Sequence[slice], moments: bool) -> TokenLogps:
    """What `logps` gives, from logits / temperature."""
    logp_TV = z_TV.log_softmax(-1)
    outside = [_log_outside(logp_TV, ids_TK[:, rest]) for rest in rests]
    return TokenLogps(
        logp=logp_TV.gather(1, ids_TK),
        log_rest=torch.stack(outside, 1) if outside else logp_TV[:, :0],
        entropy=-(logp_TV.exp() * logp_TV).sum(-1).detach() if moments else None,
        best=z_TV.argmax(-1) if moments else None,
    )


def _log_outside(logp_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """The log of the mass [T] outside `ids`."""
    outside_TV = torch.ones_like(logp_TV, dtype=torch.bool).scatter(1, ids_TK, False)
    empty_T = ~outside_TV.any(-1)
    outside_TV = outside_TV | empty_T[:, None]  # keeps -inf, and the NaN of its gradient, out of an empty row
    return torch.where(empty_T, EMPTY_REST, logp_TV.masked_fill(~outside_TV, -torch.inf).logsumexp(-1))


def reference_dense_kl(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    teacher_hidden_TE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
) -> DenseKL:
    """What `dense_kl` gives; neither head holds padding."""
    return divergence_of(hidden_TD @ head_VD.t() / temperature, teacher_hidden_TE @ teacher_head_VE.t() / temperature, divergence)


def divergence_of(z_TV: torch.Tensor, u_TV: torch.Tensor, divergence: Divergence) -> DenseKL:
    """What `dense_kl` gives, from the logits / temperature of student and teacher."""
    logp_TV = z_TV.log_softmax(-1)
    logq_TV = u_TV.detach().to(logp_TV.dtype).log_softmax(-1)
    w = divergence.weight
    match divergence.kind:
        case "forward":
            loss_T = _kl(logq_TV, logp_TV)
        case "reverse":
            loss_T = _kl(logp_TV, logq_TV)
        case "skewed":
            loss_T = w * _kl(logq_TV, logp_TV) + (1 - w) * _kl(logp_TV, logq_TV)
        case "jsd":
            logm_TV = torch.logaddexp(logq_TV + math.log(w), logp_TV + math.log(1 - w))
            loss_T = w * _kl(logq_TV, logm_TV) + (1 - w) * _kl(logp_TV, logm_TV)
    return DenseKL(
        divergence=loss_T,
        kl=_kl(logp_TV, logq_TV).detach(),
        student_entropy=-(logp_TV.exp() * logp_TV).sum(-1).detach(),
        teacher_entropy=-(logq_TV.exp() * logq_TV).sum(-1),
        agree=(logp_TV.argmax(-1) == logq_TV.argmax(-1)).to(logp_TV.dtype),
    )


def _kl(loga_TV: torch.Tensor, logb_TV: torch.Tensor) -> torch.Tensor:
    """KL(a||b) [T]."""
    return (loga_TV.exp() * (loga_TV - logb_TV)).sum(-1)


# ------------------------------------------------------------------------------------------------------ behind the doors
def whole_logits(hidden: torch.Tensor, head: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Logits / temperature [T, V] of the targets that count over all shards, float32 (float64), differentiable; on every rank."""
    return _over_shards(_Tokens.apply(hidden, plan), head, plan)


def whole_teacher_logits(teacher_TE: torch.Tensor, head: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The same from hidden states of the targets that count, which every rank has already."""
    return _over_shards(teacher_TE, head, plan)


def _over_shards(hidden_TD: torch.Tensor, head: torch.Tensor, plan: Plan) -> torch.Tensor:
    dtype = wide(hidden_TD.dtype)
    z_Tv = hidden_TD.to(dtype) @ true_rows(head, plan.shard).to(dtype).t() / plan.temperature
    return z_Tv if plan.shard.group is None else _Gathered.apply(z_Tv, plan.shard)


class _Tokens(torch.autograd.Function):
    """The targets that count, of all ranks; back, their gradient is added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(hidden)
        return kept_tokens(hidden, plan).to(wide(hidden.dtype), copy=True)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return tokens_back(grad_TD, ctx.saved_tensors[0], ctx.plan), None


class _Gathered(torch.autograd.Function):
    """The columns of all ranks side by side. Every rank derives the same loss from them, so its own columns' gradient is whole."""

    @staticmethod
    def forward(ctx: Any, z_Tv: torch.Tensor, shard: VocabShard) -> torch.Tensor:
        widths = side_by_side(torch.tensor([z_Tv.shape[1]], device=z_Tv.device), shard)[:, 0].tolist()
        rank = shard.group.rank()
        ctx.own = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
        padded_vT = F.pad(z_Tv, (0, max(widths) - z_Tv.shape[1])).t()
        return torch.cat([of_rank[:width] for of_rank, width in zip(side_by_side(padded_vT, shard), widths)]).t()

    @staticmethod
    def backward(ctx: Any, grad_TV: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_TV[:, ctx.own].contiguous(), None
