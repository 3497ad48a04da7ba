"""Reverse KL as a sum over the head of the behaviour policy plus draws from its tail: unbiased, with little variance.

Dimension key: T packed targets, K head ids per target, m distinct draws per target.
"""

from dataclasses import dataclass

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.importance import log_ratio
from megatron_opd.estimators.rest import rest_mass
from megatron_opd.types import Estimate, IdScores, Needs, TokenScores

_PRIOR_DRAWS = 4  # what half the head's mean advantage weighs in a baseline beside the draws: few draws are little to go by


@dataclass(frozen=True, kw_only=True)
class HeadTailReverseKL:
    """L = -sum_{a in S} p(a) sg[A(a) - c] - (tau_b / m) sum_i (p/b)(a_i) sg[A(a_i) - c_i],  A = log q - log p.

    S are the K most probable ids of b, tau_b = 1 - sum_S b the mass outside, and a_i are m independent draws from b
    restricted to that outside: there their probability is b / tau_b, hence the weight tau_b p / b. For every K and m the
    gradient's expectation over the draws is exactly that of KL(p || q).

    The baseline c_i is the mean advantage of the *other* draws, drawn towards half the head's mean, and c is the mean of all
    c_i. It changes no expectation, since c_i does not depend on a_i and sum_V p grad log p = 0: what c_i takes from the tail
    c gives back to the head. It takes away what draws from one tail have in common (leave-one-out baselines: Kool et al. 2019,
    "Buy 4 REINFORCE Samples, Get a Baseline for Free!").

    Where tau_b is 0 to rounding (`rest_mass`) the draws count for nothing. Value and "kl" are the same estimate of KL(p || q).
    """

    head: int = 16
    draws: int = 16  # from the tail; as many as head ids is near the least variance at equal cache
    baseline: bool = True  # False: c = c_i = 0

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
        assert draws is not None and draws.counts is not None, "needs ask for it"
        tail_mass_T, _ = rest_mass(head.behaviour_logp)
        p_TK = torch.where(scores.mask[:, None], head.student_logp, 0.0).exp()
        sampled_T = scores.mask & (tail_mass_T > 0)
        weight_Tm = tail_mass_T[:, None] * draws.counts / self.draws * log_ratio(draws, sampled_T).exp()
        head_TK, draws_Tm = _advantage(head, scores.mask), _advantage(draws, sampled_T)
        kl_T = -(p_TK * head_TK).sum(-1) - (weight_Tm * draws_Tm).sum(-1)
        surrogate_T = kl_T
        if self.baseline:
            c_T, c_Tm = self._baselines(p_TK.detach(), head_TK, draws.counts, draws_Tm)
            surrogate_T = kl_T + c_T * p_TK.sum(-1) + (weight_Tm * c_Tm).sum(-1)
        loss_T = surrogate_T + (kl_T - surrogate_T).detach()
        masses = {"support_mass": p_TK.detach().sum(-1), "behaviour_tail_mass": tail_mass_T}
        return Estimate(loss=loss_T, diagnostics={"kl": kl_T.detach(), **masses})

    def _baselines(
        self, p_TK: torch.Tensor, head_TK: torch.Tensor, counts_Tm: torch.Tensor, draws_Tm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(c [T], c_i [T, m]) for one copy of each draw: the other copies of its id are others too."""
        mean_T = (p_TK * head_TK).sum(-1) / p_TK.sum(-1).clamp_min(torch.finfo(p_TK.dtype).tiny)
        known_T = (counts_Tm * draws_Tm).sum(-1) + _PRIOR_DRAWS * mean_T / 2
        c_Tm = (known_T[:, None] - draws_Tm) / (self.draws - 1 + _PRIOR_DRAWS)
        return (counts_Tm * c_Tm).sum(-1) / self.draws, c_Tm


def _advantage(ids: IdScores, counts_T: torch.Tensor) -> torch.Tensor:
    """sg[log q - log p] [T, K]; 0 where nothing counts, whose rows may hold any numbers."""
    assert ids.teacher_logp is not None, "needs ask for it"
    return torch.where(counts_T[:, None], ids.teacher_logp - ids.student_logp.detach(), 0.0)
