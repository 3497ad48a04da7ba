"""Consistent inputs for any estimator, from nothing but hidden states or logits of student, teacher and behaviour policy.

A registered estimator joins the contract through its `needs`: whatever they name is sampled or looked up here, so a new
estimator needs no line in this file. Float64 throughout.
"""

from dataclasses import fields, replace

import torch

from megatron_opd.data.draws import merge, spread
from megatron_opd.estimators import REGISTRY, build
from megatron_opd.estimators.mix import Mix
from megatron_opd.types import DenseScores, IdScores, IdSet, MicroBatch, TokenScores

ARMS = ("none", "ppo", "truncated", "decoupled", "m2po", "sequence")
SETTINGS = {  # beside the defaults of every registered estimator
    **{f"dense_kl {kind}": ("dense_kl", {"divergence": kind, "weight": 0.3}) for kind in ("forward", "jsd", "skewed")},
    "reverse_kl_topk renormalised": ("reverse_kl_topk", {"rest": "renormalised"}),
    "draws": ("sampled_reverse_kl", {"draws": 5}),
    "frozen": ("sampled_reverse_kl", {"advantage": "frozen"}),
    "frozen draws ppo": ("sampled_reverse_kl", {"draws": 5, "advantage": "frozen", "correction": "ppo"}),
    "draws m2po": ("sampled_reverse_kl", {"draws": 5, "correction": "m2po"}),
    **{arm: ("sampled_reverse_kl", {"correction": arm}) for arm in ARMS},
}
MIXES = {"mix": ("forward_kl_topk", "head_tail_reverse_kl")}
VARIANTS = (*REGISTRY, *SETTINGS, *MIXES)
BY_SEQUENCE = ("m2po", "draws m2po", "sequence")  # a token's weight depends on its response
FROZEN = ("frozen", "frozen draws ppo")
SUPERVISED = ("sft",)
NO_DIVERGENCE = ("forward_kl_truncated",)  # not even 0 where student and teacher agree


def variant(name):
    """The estimator that a name of `VARIANTS` stands for."""
    if name in MIXES:
        first, second = MIXES[name]
        return Mix(first=build(first, {}), second=build(second, {}), second_weight=0.5)
    return build(*SETTINGS.get(name, (name, {})))


def logits(num_tokens, vocab, seed, scale=1.5):
    return torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def largest(logp, k):
    return logp.topk(min(k, logp.shape[1]), -1).indices


def outside(b_logp, head_ids):
    """b restricted to the ids outside the head [T, V]; all 0 where the head covers the vocabulary."""
    b = b_logp.exp().scatter(1, head_ids, 0.0)
    return b / b.sum(-1, keepdim=True).clamp_min(1e-300)


def sample(needs, b_logits, seed=0):
    """(tokens [T, 1] drawn from b, draws [T, m] from b outside the head)."""
    g = torch.Generator().manual_seed(seed)
    b_logp = b_logits.log_softmax(-1)
    tokens = torch.multinomial(b_logp.exp(), 1, generator=g)
    if not needs.draws:
        return tokens, None
    rest = outside(b_logp, largest(b_logp, needs.head))
    rest[rest.sum(-1) == 0] = 1  # a covered vocabulary: any id stands in, and must not count
    return tokens, torch.multinomial(rest, needs.draws, replacement=True, generator=g)


def merged(draws):
    """Draws [T, m] as they are stored: distinct ids [T, U] and how often each was drawn, filled with 0."""
    ids, counts, sizes, _ = merge(draws.numpy(), torch.zeros(draws.shape).numpy())
    return (torch.from_numpy(spread(values, sizes, int(sizes.max()))) for values in (ids.astype(int), counts.astype(float)))


def micro_batch(needs, q_logits, b_logits, tokens, draws, mask=None, teacher_hidden=None):
    """What packing would hand to the learner for these samples, as two sequences: every set that `needs` names, and no more."""
    q_logp, b_logp = q_logits.log_softmax(-1), b_logits.log_softmax(-1)
    num_tokens = len(tokens)

    def id_set(ids, behaviour, teacher, counts=None, rest=False):
        kept = 1 if counts is None else (counts > 0).double()
        return IdSet(
            ids=ids,
            counts=counts,
            behaviour_logp=b_logp.gather(1, ids) * kept if behaviour else None,
            teacher_logp=q_logp.gather(1, ids) * kept if teacher else None,
            teacher_log_rest=log_outside(q_logp, ids) if rest else None,
        )

    draw_ids, counts = merged(draws) if needs.draws else (None, None)
    half = num_tokens // 2
    return MicroBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        boundaries=torch.tensor([0, half, num_tokens], dtype=torch.int32),
        sequences=(torch.arange(num_tokens) >= half).long(),
        mask=torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask,
        token=id_set(tokens, needs.behaviour_logp, needs.teacher_token),
        head=id_set(largest(b_logp, needs.head), True, needs.teacher_head, rest=needs.head_rest) if needs.head else None,
        draws=id_set(draw_ids, True, needs.teacher_draws, counts) if needs.draws else None,
        top=id_set(largest(q_logp, needs.teacher_top), False, True) if needs.teacher_top else None,
        teacher_hidden=teacher_hidden if needs.divergence else None,
    )


def log_outside(logp, ids):
    """Log of the mass outside the ids [T]; -1000 where they cover the vocabulary."""
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, ids, True)
    covered = inside.all(-1)
    return logp.masked_fill(inside & ~covered[:, None], -torch.inf).logsumexp(-1).masked_fill(covered, -1e3)


def dense_scores(student_logits, batch, needs, q_logits=None):
    """The scores from full logits in plain autograd: no kernel, no sharding."""
    logp = student_logits.log_softmax(-1)

    def scores(name):
        one = getattr(batch, name)
        if one is None:
            return None
        return IdScores(
            ids=one.ids,
            counts=one.counts,
            student_logp=logp.gather(1, one.ids),
            behaviour_logp=one.behaviour_logp,
            teacher_logp=one.teacher_logp,
            student_log_rest=log_outside(logp, one.ids) if {"head": needs.head_rest, "top": needs.top_rest}.get(name) else None,
            teacher_log_rest=one.teacher_log_rest,
        )

    dense = None
    if needs.divergence:
        loss = divergence(needs.divergence, student_logits, q_logits)
        dense = DenseScores(divergence=loss, kl=reverse_kl(student_logits, q_logits).detach())
    named = {name: scores(name) for name in ("token", "head", "draws", "top")}
    return TokenScores(mask=batch.mask, sequences=batch.sequences, dense=dense, **named)


def with_arrays(scores, change):
    """`change(field name, [T, K] log-probabilities)` over every array of every id set of scores or a micro-batch."""
    changed = {}
    for name in ("token", "head", "draws", "top"):
        one = getattr(scores, name)
        arrays = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("ids", "counts")} if one else {}
        changed[name] = one and replace(one, **{key: change(key, array) for key, array in arrays.items() if array is not None})
    return replace(scores, **changed)


def scores_for(needs, student_logits, q_logits, b_logits, seed=0, mask=None):
    """One sampled case of scores for any needs."""
    batch = micro_batch(needs, q_logits, b_logits, *sample(needs, b_logits, seed), mask=mask)
    return dense_scores(student_logits, batch, needs, q_logits)


def divergence(which, p_logits, q_logits):
    p, q, w = p_logits.log_softmax(-1), q_logits.log_softmax(-1), which.weight
    match which.kind:
        case "forward":
            return forward_kl(p, q)
        case "reverse":
            return reverse_kl(p, q)
        case "skewed":
            return w * forward_kl(p, q) + (1 - w) * reverse_kl(p, q)
    middle = (w * q.exp() + (1 - w) * p.exp()).log()
    return (w * q.exp() * (q - middle) + (1 - w) * p.exp() * (p - middle)).sum(-1)


def reverse_kl(p_logits, q_logits):
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(p_logits, q_logits):
    return reverse_kl(q_logits, p_logits)
