"""Consistent inputs for any estimator, from nothing but logits of student, teacher and behaviour policy.

A registered estimator joins the contract through its `needs`: whatever they name is sampled or looked up here, so a new
estimator needs no line in this file. Float64 throughout.
"""

from dataclasses import fields, replace

import torch

from megatron_opd.types import IdScores, IdSet, MicroBatch, TokenScores


def logits(num_tokens, vocab, seed, scale=1.5):
    return torch.randn(num_tokens, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def largest(logp, k):
    return logp.topk(min(k, logp.shape[1]), -1).indices


def outside(b_logp, head_ids):
    """b restricted to the ids outside the head [T, V]; all 0 where the head covers the vocabulary."""
    b = b_logp.exp().scatter(1, head_ids, 0.0)
    return b / b.sum(-1, keepdim=True).clamp_min(1e-300)


def sample(needs, b_logits, seed=0):
    """(tokens [T, 1] drawn from b, tail draws [T, m] from b outside the head)."""
    g = torch.Generator().manual_seed(seed)
    b_logp = b_logits.log_softmax(-1)
    tokens = torch.multinomial(b_logp.exp(), 1, generator=g)
    if not needs.tail_draws:
        return tokens, None
    rest = outside(b_logp, largest(b_logp, needs.head))
    rest[rest.sum(-1) == 0] = 1  # a covered vocabulary: any id stands in, and must not count
    return tokens, torch.multinomial(rest, needs.tail_draws, replacement=True, generator=g)


def micro_batch(needs, q_logits, b_logits, tokens, draws, mask=None):
    """What packing would hand to the learner for these samples: every set that `needs` names, and no more."""
    q_logp, b_logp = q_logits.log_softmax(-1), b_logits.log_softmax(-1)
    num_tokens = len(tokens)

    def id_set(ids, behaviour, teacher):
        b_logp_TK = b_logp.gather(1, ids) if behaviour else None
        q_logp_TK = q_logp.gather(1, ids) if teacher else None
        return IdSet(ids=ids, behaviour_logp=b_logp_TK, teacher_logp=q_logp_TK)

    return MicroBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        boundaries=torch.tensor([0, num_tokens], dtype=torch.int32),
        mask=torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask,
        lag_origin=torch.zeros(num_tokens, dtype=torch.int64),
        token=id_set(tokens, needs.behaviour_logp, needs.teacher_token),
        head=id_set(largest(b_logp, needs.head), True, needs.teacher_head) if needs.head else None,
        draws=id_set(draws, True, needs.teacher_draws) if needs.tail_draws else None,
        top=id_set(largest(q_logp, needs.teacher_top), False, True) if needs.teacher_top else None,
    )


def dense_scores(student_logits, batch):
    """The scores from full logits in plain autograd: no kernel, no sharding."""
    logp = student_logits.log_softmax(-1)

    def scores(one):
        if one is None:
            return None
        return IdScores(ids=one.ids, student_logp=logp.gather(1, one.ids), behaviour_logp=one.behaviour_logp, teacher_logp=one.teacher_logp)

    tail = None
    if batch.top is not None:
        inside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, batch.top.ids, True)
        covered = inside.all(-1)
        tail = logp.masked_fill(inside & ~covered[:, None], -torch.inf).logsumexp(-1).masked_fill(covered, -1e3)
    named = {name: scores(getattr(batch, name)) for name in ("token", "head", "draws", "top")}
    return TokenScores(mask=batch.mask, top_log_tail=tail, **named)


def with_arrays(scores, change):
    """`change(field name, [T, K] log-probabilities)` over every array of every id set of scores or a micro-batch."""
    changed = {}
    for name in ("token", "head", "draws", "top"):
        one = getattr(scores, name)
        arrays = {f.name: getattr(one, f.name) for f in fields(one) if f.name != "ids"} if one else {}
        changed[name] = one and replace(one, **{key: change(key, array) for key, array in arrays.items() if array is not None})
    return replace(scores, **changed)


def scores_for(needs, student_logits, q_logits, b_logits, seed=0, mask=None):
    """One sampled case of scores for any needs."""
    return dense_scores(student_logits, micro_batch(needs, q_logits, b_logits, *sample(needs, b_logits, seed), mask=mask))


def reverse_kl(p_logits, q_logits):
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(p_logits, q_logits):
    return reverse_kl(q_logits, p_logits)
