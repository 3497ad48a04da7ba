"""Forward KL on the teacher's K best ids with the rest dropped: what many systems do, here for comparison.

Dimension key: T packed targets, K ids per target.
"""

from dataclasses import dataclass

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class ForwardKLTruncated:
    """L = sum_K q (log q - log p), K the teacher's most probable ids.

    The sum is no divergence: it can be negative, and its gradient at p = q is not zero but pulls mass out of the rest of the
    vocabulary. `forward_kl_topk` mends both at the same cache.
    """

    top_k: int = 16

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"forward_kl_truncated: top_k={self.top_k} must be at least 1")

    @property
    def needs(self) -> Needs:
        """The teacher's K best ids with log q."""
        return Needs(teacher_top=self.top_k)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The truncated sum of each target."""
        assert scores.top is not None and scores.top.teacher_logp is not None, "needs ask for it"
        logq_TK = torch.where(scores.mask[:, None], scores.top.teacher_logp, 0.0)
        loss_T = (logq_TK.exp() * (logq_TK - scores.top.student_logp)).sum(-1)
        return Estimate(loss=loss_T, diagnostics={"kl": loss_T.detach()})
