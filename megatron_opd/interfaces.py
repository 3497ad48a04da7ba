"""The seams: where two real implementations exist."""

from collections.abc import Sequence
from typing import Protocol

from megatron_opd.types import Estimate, JoinTransport, Needs, Prompt, Rollout, TeacherScores, TokenScores


class Estimator(Protocol):
    """A distillation objective: a frozen dataclass whose fields are its settings."""

    @property
    def needs(self) -> Needs:
        """What rollouts and teachers must deliver for it."""

    def __call__(self, scores: TokenScores) -> Estimate:
        """One loss per token [T], in nats."""


class RolloutBackend(Protocol):
    """Draws responses and takes new weights between tokens."""

    async def generate(self, prompt: Prompt) -> Rollout:
        """One response; many may be asked for at once."""

    async def join_transport(self, request: JoinTransport) -> None:
        """Joins the learner's weight group."""

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Receives while requests run on, then pauses, swaps, resumes; returns seconds by part."""

    async def close(self) -> None:
        """Gives up what runs and ends the engine."""


class TeacherBackend(Protocol):
    """Scores finished rollouts; called with as many as fit its token budget."""

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Scores in the order of `rollouts`, aligned with each response."""

    def close(self) -> None:
        """Frees the model."""
