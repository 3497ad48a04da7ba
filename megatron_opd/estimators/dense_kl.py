"""Divergences over the whole vocabulary, from the teacher's hidden states: no sampling noise, no support, the largest cache."""

from dataclasses import dataclass
from typing import Literal

from megatron_opd.errors import ConfigError
from megatron_opd.types import Divergence, Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class DenseKL:
    """L = KL(q || p), KL(p || q), a mix of the two, or the generalised Jensen-Shannon divergence, summed over every id.

    The generalised JSD with beta = weight and m = beta q + (1 - beta) p is beta KL(q || m) + (1 - beta) KL(p || m)
    (Agarwal et al. 2023, arXiv 2306.13649).
    """

    divergence: Literal["forward", "reverse", "jsd", "skewed"] = "reverse"
    weight: float = 0.5  # jsd: beta; skewed: share of the forward KL

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or (self.divergence == "jsd" and self.weight in (0, 1)):
            raise ConfigError(f"dense_kl: weight={self.weight} must lie in [0, 1], and inside it for jsd")

    @property
    def needs(self) -> Needs:
        """The teacher's hidden states."""
        return Needs(divergence=Divergence(kind=self.divergence, weight=self.weight))

    def __call__(self, scores: TokenScores) -> Estimate:
        """The divergence of each target, as the kernels computed it."""
        assert scores.dense is not None, "needs ask for it"
        return Estimate(loss=scores.dense.divergence, diagnostics={"kl": scores.dense.kl})
