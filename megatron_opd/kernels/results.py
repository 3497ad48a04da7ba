"""What the two doors give, whichever implementation stands behind them.

Dimension key: T packed targets, K ids per target, N rests.
"""

from dataclasses import dataclass

import torch

EMPTY_REST = -1e3  # log rest where the ids cover the vocabulary: its exp is 0 and a rounding error times it is small


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogps:
    """What `logps` knows of each target, in nats, float32 (float64 for float64 inputs); 0 for targets that do not count."""

    logp: torch.Tensor  # [T, K] log p at `ids`, differentiable
    log_rest: torch.Tensor  # [T, N] log of the mass outside `ids[:, rests[n]]`, differentiable
    entropy: torch.Tensor | None = None  # [T] of p over the whole vocabulary, no gradient
    best: torch.Tensor | None = None  # [T] int64, id of the largest logit, of equal ones the lowest


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseKL:
    """What `dense_kl` knows of each target, in nats, float32 (float64 for a float64 student); 0 for targets that do not count."""

    divergence: torch.Tensor  # [T] differentiable in the student
    kl: torch.Tensor  # [T] KL(p||q) whatever the divergence, no gradient
    student_entropy: torch.Tensor  # [T] no gradient
    teacher_entropy: torch.Tensor  # [T]
    agree: torch.Tensor  # [T] 1 where the largest logits of both, of equal ones the lowest id, are of one id, else 0
