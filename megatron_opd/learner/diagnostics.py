"""What a step looked like, beside its loss. Everything is a sum over tokens, so micro-batches and ranks add up.

Dimension key: T packed targets, B bins.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from megatron_opd.learner.scores import Moments
from megatron_opd.types import Estimate, MicroBatch, TokenScores, Trajectory

NOISE = "fp8_noise"  # the sum of what FP8 logits add to the KL, and over how many tokens: it is measured on some only
_RATIO = "ratio_bins"
_POSITION_KL, _POSITION_TOKENS = "kl_bins", "token_bins"
_EDGES = torch.linspace(-5, 5, 401)  # of log p/b: quantiles are known to 2.5 %
_POSITION_BINS = 32  # 0, 1, 2-3, 4-7, ...
_QUANTILES = (0.01, 0.5, 0.99)

Sums = dict[str, list[float]]  # name -> one number, or one for each bin


def sums(batch: MicroBatch, scores: TokenScores, estimate: Estimate, moments: Moments) -> dict[str, torch.Tensor]:
    """Sums over the targets of one micro-batch that count: [1] or [B] each."""
    per_token = {"loss": estimate.loss.detach(), **estimate.diagnostics}
    per_token |= {
        name: value for name in ("student_entropy", "teacher_entropy", "agreement") if (value := getattr(moments, name)) is not None
    }
    found: dict[str, torch.Tensor] = {}
    if scores.token is not None and scores.token.behaviour_logp is not None:
        log_ratio = (scores.token.student_logp.detach() - scores.token.behaviour_logp)[:, 0]
        per_token["mismatch"] = log_ratio.abs()  # what lag and different numerics of engine and learner come to
        per_token["ratio"] = log_ratio.exp()  # p/b: its mean over tokens of b is 1
        per_token["ratio_squared"] = (2 * log_ratio).exp()
        found[_RATIO] = torch.bincount(torch.bucketize(log_ratio[batch.mask], _EDGES.to(log_ratio)), minlength=len(_EDGES) + 1)
    if "kl" in estimate.diagnostics:
        bins = _position_bins(batch)
        found[_POSITION_KL] = torch.bincount(bins, estimate.diagnostics["kl"][batch.mask], minlength=_POSITION_BINS)
        found[_POSITION_TOKENS] = torch.bincount(bins, minlength=_POSITION_BINS)
    return found | {name: torch.where(batch.mask, value, 0.0).sum()[None] for name, value in per_token.items()}


def lags(trajectories: Sequence[Trajectory], version: int) -> dict[int, int]:
    """Lag in optimizer steps -> response tokens, of trajectories that weights of `version` are trained on."""
    found: Counter[int] = Counter()
    for rollout in (one.rollout for one in trajectories):
        ends = [segment.first_token for segment in rollout.segments[1:]] + [len(rollout.response_ids)]
        for segment, end in zip(rollout.segments, ends, strict=True):
            found[version - segment.version] += end - segment.first_token
    return dict(found)


def add(total: Sums, part: Mapping[str, list[float]]) -> None:
    """Adds `part` to `total`."""
    for name, values in part.items():
        total[name] = [a + b for a, b in zip(total[name], values, strict=True)] if name in total else list(values)


def report(total: Sums, tokens: int) -> tuple[dict[str, float], dict[int, float]]:
    """(means over all tokens, and quantiles of p/b; mean "kl" by the first response position of its bin)."""
    total = dict(total)
    ratios, kl, counts = (total.pop(name, []) for name in (_RATIO, _POSITION_KL, _POSITION_TOKENS))
    noise, measured = total.pop(NOISE, (0.0, 0))
    means = {name: values[0] / max(tokens, 1) for name, values in total.items()}
    if measured:
        means[NOISE] = noise / measured
    if "ratio_squared" in means:
        squared = means.pop("ratio_squared")
        means["effective_samples"] = means["ratio"] ** 2 / squared if squared else 0.0  # (sum r)^2 / (n sum r^2), in (0, 1]
        means |= {f"ratio_p{round(100 * q):02}": _quantile(ratios, q) for q in _QUANTILES}
    return means, {(1 << b) >> 1: value / n for b, (value, n) in enumerate(zip(kl, counts)) if n}


def _position_bins(batch: MicroBatch) -> torch.Tensor:
    """The bin of each response token that counts: the number of bits of its position in the response."""
    seen = batch.mask.cumsum(0)
    before = torch.cat([seen.new_zeros(1), seen])[batch.boundaries.long()[batch.sequences]]
    return torch.frexp((seen - 1 - before)[batch.mask].float()).exponent.long()


def _quantile(bins: list[float], q: float) -> float:
    """p/b below which a share q of the tokens lies, from counts per bin of log p/b."""
    if not sum(bins):
        return 1.0
    seen = 0.0
    for index, count in enumerate(bins):
        seen += count
        if seen >= q * sum(bins):
            low, high = _EDGES[max(index - 1, 0)].item(), _EDGES[min(index, len(_EDGES) - 1)].item()
            return math.exp((low + high) / 2)
    raise AssertionError("the last bin holds the rest")
