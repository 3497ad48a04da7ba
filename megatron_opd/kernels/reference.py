"""The slow twins: full logits in plain autograd on one rank. What the kernels mean, for readers and tests.

Dimension key: T packed targets, K ids per target, D hidden size of the student, E of the teacher, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch

from megatron_opd.kernels.dense_kl import DenseKL
from megatron_opd.kernels.logps import EMPTY_REST, TokenLogps
from megatron_opd.types import Divergence


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
    z_TV = hidden_TD @ head_VD.t() / temperature
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
    logp_TV = (hidden_TD @ head_VD.t() / temperature).log_softmax(-1)
    logq_TV = (teacher_hidden_TE @ teacher_head_VE.t() / temperature).detach().to(logp_TV.dtype).log_softmax(-1)
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
