"""Reverse KL as a sum over the head of the behaviour policy plus draws from its tail: unbiased, with little variance.

Dimension key: T packed targets, K head ids per target, m draws per target.
"""

from dataclasses import dataclass

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.importance import log_ratio, shares
from megatron_opd.estimators.rest import rest_mass
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class HeadTailReverseKL:
    """L = -sum_{a in S} p(a) sg[A(a)] - (tau_b / m) sum_i (p/b)(a_i) sg[A(a_i)],  A = log q - log p.

    S are the K most probable ids of b, tau_b = 1 - sum_S b the mass outside, and a_i are m independent draws from b
    restricted to that outside: there their probability is b / tau_b, hence the weight tau_b p / b. For every K and m the
    gradient's expectation over the draws is exactly that of KL(p || q). Where tau_b is 0 to rounding (`rest_mass`) the
    draws count for nothing. Value and "kl" are the same estimate of KL(p || q).
    """

    head: int = 16
    draws: int = 16  # from the tail; as many as head ids is near the least variance at equal cache

    def __post_init__(self) -> None:
        for name in ("head", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"head_tail_reverse_kl: {name}={getattr(self, name)} must be at least 1")

    @property
    def needs(self) -> Needs:
        """Head and tail draws of b with log q at both; log b of the generated token only to report how far p is from it."""
        return Needs(behaviour_logp=True, head=self.head, draws=self.draws, teacher_head=True, teacher_draws=True)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The surrogate of each target."""
        head, draws = scores.head, scores.draws
        assert head is not None and head.behaviour_logp is not None and head.teacher_logp is not None, "needs ask for it"
        assert draws is not None and draws.teacher_logp is not None, "needs ask for it"
        tail_mass_T, _ = rest_mass(head.behaviour_logp)
        p_TK = torch.where(scores.mask[:, None], head.student_logp, 0.0).exp()
        head_T = -(p_TK * (head.teacher_logp - head.student_logp.detach())).sum(-1)
        ratio_Tm = log_ratio(draws, scores.mask & (tail_mass_T > 0)).exp()
        tail_T = -tail_mass_T * (shares(draws, self.draws) * ratio_Tm * (draws.teacher_logp - draws.student_logp.detach())).sum(-1)
        loss_T = head_T + tail_T
        masses = {"support_mass": p_TK.detach().sum(-1), "tail_mass": tail_mass_T}
        return Estimate(loss=loss_T, diagnostics={"kl": loss_T.detach(), **masses})
