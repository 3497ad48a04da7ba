"""Supervised fine-tuning: cross-entropy on the data set's own completions. Needs neither rollouts nor a teacher."""

from dataclasses import dataclass

from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class SFT:
    """L = -log p(token)."""

    @property
    def needs(self) -> Needs:
        """Completions from the prompt file."""
        return Needs(generation=False)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The cross-entropy of each target."""
        return Estimate(loss=-scores.token.student_logp[:, 0])
