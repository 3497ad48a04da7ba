"""Importance ratios between the current student and the policy that sampled. One file, so that masking is thought of once.

Dimension key: T packed targets, K ids per target.
"""

import torch

from megatron_opd.types import IdScores, TokenScores


def ratio(ids: IdScores, counts_T: torch.Tensor) -> torch.Tensor:
    """p / b [T, K], differentiable; 1 without gradient where `counts` [T] is False, whose rows may hold any numbers."""
    assert ids.behaviour_logp is not None, "the estimator's needs must ask for log b of these ids"
    return torch.where(counts_T[:, None], ids.student_logp - ids.behaviour_logp, 0.0).exp()


def ratio_diagnostic(scores: TokenScores) -> dict[str, torch.Tensor]:
    """{"ratio": p / b of the generated token [T]} if log b of it is there: its mean over tokens of `b` is 1."""
    if scores.token.behaviour_logp is None:
        return {}
    return {"ratio": ratio(scores.token, scores.mask).detach()[:, 0]}
