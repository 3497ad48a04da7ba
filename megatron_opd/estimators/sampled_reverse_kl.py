"""Reverse KL from samples: the generated token or m draws, with every treatment of staleness as a setting.

Source: "AsyncOPD: How Stale Can On-Policy Distillation Be?" (arXiv 2606.24143).
Dimension key: T packed targets, K distinct draws per target.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.importance import Correction, Kind, log_ratio, shares
from megatron_opd.types import Estimate, Needs, TokenScores


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL:
    """L = -(1/m) sum_i (p/b)(a_i) sg[A(a_i)], A = log q - log p, a_i drawn from b; no clip.

    E_b of its gradient is exactly the gradient of KL(p || q), however stale b is, as long as b > 0 wherever p > 0. The other
    settings are the arms of the staleness study: an advantage log q - log b frozen at rollout, and what `importance` lists in
    place of the plain ratio. A frozen advantage without a clip is linear in p and collapses. "kl" estimates KL(p || q) under
    every setting.
    """

    draws: int = 0  # m extra draws per position; 0: the generated token alone
    advantage: Literal["recomputed", "frozen"] = "recomputed"
    correction: Kind = "ratio"  # type: ignore[valid-type]
    clip: float = 0.2  # of ppo
    cap: float = 2.0  # of truncated and decoupled
    budget: float = 0.04  # of m2po

    def __post_init__(self) -> None:
        if self.draws < 0:
            raise ConfigError(f"sampled_reverse_kl: draws={self.draws} must be 0 or more")
        self._correction()

    @property
    def needs(self) -> Needs:
        """log b of the generated token, and log b and log q of what is summed over."""
        return Needs(behaviour_logp=True, draws=self.draws, teacher_token=not self.draws, teacher_draws=self.draws > 0)

    def __call__(self, scores: TokenScores) -> Estimate:
        """The surrogate of each target."""
        ids = scores.draws if self.draws else scores.token
        assert ids is not None and ids.teacher_logp is not None and ids.behaviour_logp is not None, "needs ask for it"
        share = shares(ids, self.draws)
        recomputed = ids.teacher_logp - ids.student_logp.detach()
        advantage = recomputed if self.advantage == "recomputed" else ids.teacher_logp - ids.behaviour_logp
        loss_T = -(share * self._correction()(ids, advantage, scores)).sum(-1)
        kl_T = -(share * log_ratio(ids, scores.mask).detach().exp() * recomputed).sum(-1)
        return Estimate(loss=loss_T, diagnostics={"kl": kl_T})

    def _correction(self) -> Correction:
        return Correction(kind=self.correction, clip=self.clip, cap=self.cap, budget=self.budget)
