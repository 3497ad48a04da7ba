"""A teacher without a model: one distribution over the vocabulary, drawn from a seed. For tests."""

from collections.abc import Sequence

import numpy as np

from megatron_opd.types import Needs, Rollout, TeacherScores


class ScriptedTeacher:
    """`TeacherBackend` whose q is the same at every position; all it reports is true of that q."""

    def __init__(self, *, needs: Needs, vocab_size: int, seed: int = 0) -> None:
        logits_V = np.random.default_rng(seed).normal(size=vocab_size)
        self._logp_V = (logits_V - np.log(np.exp(logits_V).sum())).astype(np.float32)
        self._order_V = np.argsort(-self._logp_V, kind="stable").astype(np.int32)
        self._needs = needs

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Looks every asked-for id up."""
        return [self._score(rollout) for rollout in rollouts]

    def close(self) -> None:
        """Holds nothing."""

    def _score(self, rollout: Rollout) -> TeacherScores:
        needs = self._needs
        top_ids = np.tile(self._order_V[: needs.teacher_top], (len(rollout.response_ids), 1))
        return TeacherScores(
            index=rollout.index,
            token_logp=self._logp_V[rollout.response_ids] if needs.teacher_token else None,
            head_logp=self._logp_V[rollout.head_ids] if needs.teacher_head else None,
            head_log_rest=self._log_rest(rollout.head_ids) if needs.head_rest else None,
            draw_logp=self._logp_V[rollout.draw_ids] if needs.teacher_draws else None,
            top_ids=top_ids if needs.teacher_top else None,
            top_logp=self._logp_V[top_ids] if needs.teacher_top else None,
            entropy=np.full(len(rollout.response_ids), -np.sum(np.exp(self._logp_V) * self._logp_V), np.float32) if needs.moments else None,
            best_ids=np.full(len(rollout.response_ids), self._order_V[0]) if needs.moments else None,
        )

    def _log_rest(self, ids_RK: np.ndarray) -> np.ndarray:
        """Log of the mass outside the ids of each position."""
        outside_RV = np.ones((len(ids_RK), len(self._logp_V)), bool)
        np.put_along_axis(outside_RV, ids_RK, False, 1)
        return np.log((np.exp(self._logp_V) * outside_RV).sum(1)).astype(np.float32)
