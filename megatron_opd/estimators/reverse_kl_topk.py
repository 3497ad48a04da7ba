"""Reverse KL on the K most probable ids of the behaviour policy: low variance, and biased as the student leaves that support.

Dimension key: T packed targets, K ids per target.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.rest import rest_mass
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class ReverseKLTopK:
    """L = sum_K p (log p - log q) + p_rest (log p_rest - log q_rest), K the most probable ids of b; the support is a constant.

    With rest="bucket" all mass outside the K ids is one more outcome, so L is at least 0 and never exceeds KL(p || q). With
    rest="renormalised" both are conditioned on the K ids, and mass outside them is free. Either way what happens among the
    other ids is not seen, and on stale rollouts the K ids are those of an older student: the support mismatch of arXiv
    2606.24143. `head_tail_reverse_kl` corrects it with draws.
    """

    head: int = 16
    rest: Literal["bucket", "renormalised"] = "bucket"

    def __post_init__(self) -> None:
        if self.head < 1:
            raise ConfigError(f"reverse_kl_topk: head={self.head} must be at least 1")

    @property
    def needs(self) -> Needs:
        """The head of b with log q there, and outside for the bucket."""
        return Needs(head=self.head, teacher_head=True, head_rest=self.rest == "bucket")

    def __call__(self, scores: TokenScores) -> Estimate:
        """The divergence of each target; its gradient is sum p (log p - log q) grad log p, exactly 0 at p = q."""
        head = scores.head
        assert head is not None and head.behaviour_logp is not None and head.teacher_logp is not None, "needs ask for it"
        logp_TK, logq_TK = (torch.where(scores.mask[:, None], logp, 0.0) for logp in (head.student_logp, head.teacher_logp))
        support_T = logp_TK.detach().exp().sum(-1)
        behaviour_rest_T, _ = rest_mass(torch.where(scores.mask[:, None], head.behaviour_logp, 0.0))
        if self.rest == "renormalised":
            logp_TK, logq_TK = logp_TK.log_softmax(-1), logq_TK.log_softmax(-1)
        else:
            assert head.student_log_rest is not None and head.teacher_log_rest is not None, "needs ask for it"
            rests = (torch.where(scores.mask, rest, 0.0)[:, None] for rest in (head.student_log_rest, head.teacher_log_rest))
            logp_TK, logq_TK = (torch.cat([logp, rest], 1) for logp, rest in zip((logp_TK, logq_TK), rests))
        loss_T = (logp_TK.exp() * (logp_TK - logq_TK).detach()).sum(-1)
        masses = {"support_mass": support_T, "behaviour_tail_mass": behaviour_rest_T}
        return Estimate(loss=loss_T, diagnostics={"kl": loss_T.detach(), **masses})
