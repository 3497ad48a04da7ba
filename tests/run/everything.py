"""Estimators that are many at once, to prove them all by one run of the whole pipeline."""

from dataclasses import dataclass, fields, replace
from functools import reduce

import torch

from megatron_opd.types import Estimate, Needs
from tests.estimators.cases import NO_DIVERGENCE, SUPERVISED, VARIANTS, variant

# No teacher; not 0 where student and teacher agree; and a run has one divergence, the same door for all kinds.
_LEFT_OUT = (*SUPERVISED, *NO_DIVERGENCE, "dense_kl forward", "dense_kl skewed")


def _from_draws(name):
    """Draws are either of all of b or of what a head leaves."""
    needs = variant(name).needs
    return name == "dense_kl jsd" or bool(needs.draws and not needs.head)


_VARIANTS = [name for name in VARIANTS if name not in _LEFT_OUT]
FROM_DRAWS = ("forward_kl_topk", *filter(_from_draws, _VARIANTS))
FROM_HEAD = tuple(name for name in _VARIANTS if not _from_draws(name))
TOLERANCE = 1e-3  # nats


def union(one: Needs, other: Needs) -> Needs:
    return replace(one, **{f.name: getattr(one, f.name) or getattr(other, f.name) for f in fields(Needs)})


@dataclass(frozen=True, kw_only=True)
class Everything:
    """The sum of the losses of a group of variants; diagnostics are each one's own loss, and what is `apart`."""

    group: str = "head"

    @property
    def parts(self):
        return {name: variant(name) for name in (FROM_HEAD if self.group == "head" else FROM_DRAWS)}

    @property
    def needs(self):
        return reduce(union, (part.needs for part in self.parts.values()))

    def __call__(self, scores):
        losses = {name: part(scores).loss for name, part in self.parts.items()}
        diagnostics = {name: loss.detach() for name, loss in losses.items()}
        return Estimate(loss=sum(losses.values()), diagnostics={**diagnostics, **apart(scores)})


def apart(scores):
    """By whom p is compared with, [T] 1 where it differs by more than `TOLERANCE` at any id: a mean of 0 bounds the largest error."""
    found = {"behaviour": torch.zeros_like(scores.mask), "teacher": torch.zeros_like(scores.mask)}
    for ids in filter(None, (scores.token, scores.head, scores.draws, scores.top)):
        for whom, differs in found.items():
            logp = getattr(ids, f"{whom}_logp")
            if logp is not None:
                wrong = ~((ids.student_logp.detach() - logp).abs() <= TOLERANCE)
                differs |= (wrong if ids.counts is None else wrong & (ids.counts > 0)).any(1)
    return {f"apart_from_{whom}": differs.float() for whom, differs in found.items()}
