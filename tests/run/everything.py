"""Estimators that are many at once, to prove them all by one run of the whole pipeline."""

from dataclasses import dataclass, fields, replace
from functools import reduce

from megatron_opd.types import Estimate, Needs
from tests.estimators.cases import variant

FROM_HEAD = (
    "head_tail_reverse_kl", "reverse_kl_topk", "reverse_kl_topk renormalised", "forward_kl_topk", "sampled_reverse_kl", "none", "ppo",
    "truncated", "decoupled", "m2po", "sequence", "frozen",
)  # fmt: skip
FROM_DRAWS = ("draws", "frozen draws ppo", "draws m2po", "dense_kl jsd", "forward_kl_topk")


def union(one: Needs, other: Needs) -> Needs:
    return replace(one, **{f.name: getattr(one, f.name) or getattr(other, f.name) for f in fields(Needs)})


@dataclass(frozen=True, kw_only=True)
class Everything:
    """The sum of the losses of a group of variants; each one's own loss is a diagnostic."""

    group: str = "head"

    @property
    def parts(self):
        return {name: variant(name) for name in (FROM_HEAD if self.group == "head" else FROM_DRAWS)}

    @property
    def needs(self):
        return reduce(union, (part.needs for part in self.parts.values()))

    def __call__(self, scores):
        losses = {name: part(scores).loss for name, part in self.parts.items()}
        return Estimate(loss=sum(losses.values()), diagnostics={name: loss.detach() for name, loss in losses.items()})
