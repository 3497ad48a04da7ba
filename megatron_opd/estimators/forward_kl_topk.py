"""Forward KL on the teacher's K best ids with a tail bucket: robust to stale rollouts, since no sample weighs it.

Dimension key: T packed targets, K ids per target.
"""

from dataclasses import dataclass

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.rest import rest_mass
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class ForwardKLTopK:
    """L = sum_K q (log q - log p) + q_rest (log q_rest - log p_rest), K the teacher's most probable ids.

    All mass outside the K ids is one more outcome. So L is at least 0, is 0 with zero gradient where p = q, never exceeds
    the full KL(q || p) and reaches it as K grows to the vocabulary. Without the bucket L could be negative and would pull
    mass out of the tail even at p = q. p_rest is exact; q_rest is a difference to 1, 0 when it is rounding noise
    (`rest_mass`), which then costs the loss no more than that noise.
    """

    top_k: int = 16

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"forward_kl_topk: top_k={self.top_k} must be at least 1")

    @property
    def needs(self) -> Needs:
        """The teacher's K best ids with log q, and the student's mass outside them."""
        return Needs(teacher_top=self.top_k, top_rest=True)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The coarse-grained KL(q || p) of each target."""
        top = scores.top
        assert top is not None and top.teacher_logp is not None and top.student_log_rest is not None, "needs ask for it"
        logq_TK = torch.where(scores.mask[:, None], top.teacher_logp, 0.0)
        q_rest_T, logq_rest_T = rest_mass(logq_TK)
        known_T = (logq_TK.exp() * (logq_TK - top.student_logp)).sum(-1)
        loss_T = known_T + q_rest_T * (logq_rest_T - top.student_log_rest)
        masses = {"support_mass": -torch.expm1(top.student_log_rest.detach().clamp_max(0)), "teacher_tail_mass": q_rest_T}
        return Estimate(loss=loss_T, diagnostics={"kl": loss_T.detach(), **masses})
