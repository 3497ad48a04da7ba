"""Importance ratios between the current student and the policy that sampled, and what is made of them on stale data.

One file, so that masking is thought of once. A correction turns (log p/b, advantage) of sampled ids into a surrogate whose
gradient climbs the advantage; written with r = p/b, r0 = p/sg[p] (1, with the gradient of log p) and A the advantage:

    ratio      r A                               unbiased (with A recomputed), unbounded
    none       r0 A                              ignores that b is not p
    ppo        min(r A, clip(r, 1-eps, 1+eps) A) Schulman et al. 2017 (arXiv 1707.06347)
    truncated  sg[min(r, cap)] r0 A              truncated importance sampling, Ionides 2008; V-trace's weight (arXiv 1802.01561)
    decoupled  sg[r] r0 A where r <= cap, else 0 decoupled PPO (arXiv 2110.00641) as AReaL runs it (arXiv 2505.24298): the
                                                 proximal policy is the student at the start of the step, from which a single
                                                 update never departs, so its own clip never binds
    m2po       r A, without the ids that break the budget: M2PO (arXiv 2510.01161)
    sequence   sg[s] r0 A, s = exp(mean log r)   one weight for a response: GSPO (arXiv 2507.18071), its token-level form

Dimension key: T packed targets, K ids per target.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_opd.errors import ConfigError
from megatron_opd.types import IdScores, TokenScores

_LARGEST = 40.0  # nats: a ratio beyond e^40 trains nothing, and its exponential must stay finite

Kind = Literal["ratio", "none", "ppo", "truncated", "decoupled", "m2po", "sequence"]


def log_ratio(ids: IdScores, mask_T: torch.Tensor) -> torch.Tensor:
    """log p - log b [T, K], differentiable; 0 without gradient where `mask` is False, whose rows may hold any numbers, and for filling."""
    assert ids.behaviour_logp is not None, "the estimator's needs must ask for log b of these ids"
    counted = mask_T[:, None] if ids.counts is None else mask_T[:, None] & (ids.counts > 0)
    return torch.where(counted, ids.student_logp - ids.behaviour_logp, 0.0).clamp_max(_LARGEST)


def shares(ids: IdScores, num_draws: int) -> torch.Tensor | float:
    """The weight [T, K] of each id in the mean over `num_draws` draws; duplicates are stored once and counted."""
    return 1.0 if ids.counts is None else ids.counts / num_draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What is made of a ratio."""

    kind: Kind = "ratio"
    clip: float = 0.2  # ppo: epsilon
    cap: float = 2.0  # truncated, decoupled: largest weight
    budget: float = 0.04  # m2po: largest mean of (log r)^2 over a response

    def __post_init__(self) -> None:
        for name in ("clip", "cap", "budget"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"sampled_reverse_kl: {name}={getattr(self, name)} must be greater than 0")

    def __call__(self, ids: IdScores, advantage_TK: torch.Tensor, scores: TokenScores) -> torch.Tensor:
        """The surrogate [T, K] of each id; 0 where nothing counts."""
        log_r = log_ratio(ids, scores.mask)
        r, fresh = log_r.exp(), (log_r - log_r.detach()).exp()
        match self.kind:
            case "ratio":
                return r * advantage_TK
            case "none":
                return fresh * advantage_TK
            case "ppo":
                return torch.minimum(r * advantage_TK, r.clamp(1 - self.clip, 1 + self.clip) * advantage_TK)
            case "truncated":
                return r.detach().clamp_max(self.cap) * fresh * advantage_TK
            case "decoupled":
                return torch.where(r.detach() <= self.cap, r.detach(), 0.0) * fresh * advantage_TK
            case "m2po":
                return torch.where(self._within_budget(ids, log_r.detach(), advantage_TK, scores), r * advantage_TK, 0.0)
            case "sequence":
                return _sequence_ratio(scores)[:, None] * fresh * advantage_TK

    def _within_budget(self, ids: IdScores, log_r: torch.Tensor, advantage: torch.Tensor, scores: TokenScores) -> torch.Tensor:
        """Which ids [T, K] keep their gradient. While a response's mean of (log r)^2 holds the budget, all do, on either side.

        Past it, those with the largest (log r)^2 are left out until the mean of the rest holds it, save where the update
        would bring p back to b, which PPO never clips either. The original takes the mean over a batch; over a response it
        does not depend on how the batch is cut into micro-batches.
        """
        weight = (scores.mask[:, None] & torch.ones_like(log_r, dtype=torch.bool)).to(log_r.dtype)
        weight = weight if ids.counts is None else weight * ids.counts
        weight, square = weight.flatten().double(), log_r.square().flatten().double()  # sums over all responses, whose ends are subtracted
        sequence = scores.sequences[:, None].expand_as(log_r).flatten()
        order = square.argsort(stable=True)
        order = order[sequence[order].argsort(stable=True)]  # by sequence, and by rising square within one
        mass, moment = weight[order].cumsum(0), (weight * square)[order].cumsum(0)
        first = torch.searchsorted(sequence[order].contiguous(), sequence[order].contiguous())  # of its own sequence
        mass_before, moment_before = (torch.cat([x.new_zeros(1), x])[first] for x in (mass, moment))
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = moment - moment_before <= self.budget * (mass - mass_before)
        returning = log_r * advantage <= 0
        return kept.view_as(log_r) | returning


def _sequence_ratio(scores: TokenScores) -> torch.Tensor:
    """The geometric mean [T] of p/b over the generated tokens of the response that each target belongs to; detached."""
    assert scores.token is not None, "needs ask for it"
    log_r = log_ratio(scores.token, scores.mask).detach()[:, 0]
    num_sequences = int(scores.sequences.max()) + 1
    total = log_r.new_zeros(num_sequences).index_add_(0, scores.sequences, log_r)
    count = log_r.new_zeros(num_sequences).index_add_(0, scores.sequences, scores.mask.to(log_r.dtype))
    return (total / count.clamp_min(1)).exp()[scores.sequences]
