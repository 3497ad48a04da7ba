"""Reverse KL from the generated token alone, with the advantage recomputed under the current student.

Source: "AsyncOPD: How Stale Can On-Policy Distillation Be?" (arXiv 2606.24143).
Dimension key: T packed targets.
"""

from dataclasses import dataclass

from megatron_opd.estimators.importance import ratio
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL:
    """L = -(p/b) sg[A], A = log q - log p, at one token drawn from b; no clip.

    E_b of its gradient is exactly the gradient of KL(p || q), however stale b is, as long as b > 0 wherever p > 0.
    """

    @property
    def needs(self) -> Needs:
        """log b and log q of the generated token."""
        return Needs(behaviour_logp=True, teacher_token=True)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The surrogate of each target; its value estimates KL(p || q) too."""
        assert scores.token.teacher_logp is not None, "needs ask for it"
        ratio_T = ratio(scores.token, scores.mask)[:, 0]
        advantage_T = (scores.token.teacher_logp - scores.token.student_logp.detach())[:, 0]
        loss_T = -ratio_T * advantage_T
        return Estimate(loss=loss_T, diagnostics={"kl": loss_T.detach(), "ratio": ratio_T.detach()})
