"""A rollout backend without a model: tokens, lengths and waiting times follow from a seed. For tests."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_opd.data.draws import merge
from megatron_opd.errors import PeerError
from megatron_opd.types import JoinTransport, Needs, Prompt, Rollout, Segment
from megatron_opd.weights.stages import StagedReceiver


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedSettings:
    """What the script says."""

    needs: Needs
    vocab_size: int
    max_response_tokens: int
    end_id: int
    seed: int = 0
    version: int = 0  # of the weights that it pretends to have at the start
    token_s: float = 0.0  # seconds per token
    timeout_s: float = 120.0  # of a weight update
    length: Callable[[int], int] | None = None  # prompt index -> response tokens, to script stragglers; None: drawn from the seed
    piece_tokens: int = 0  # as `rollout.piece_tokens`


class ScriptedRollout:
    """`RolloutBackend` whose response to prompt i depends on seed and i alone, whatever runs beside it; versions are real.

    All distributions are the same one, b(token) ~ exp(-z) with z drawn from the seed, so recorded log-probabilities are true.
    It joins a real weight transport if told to, verifies each update and drops it.
    """

    def __init__(self, settings: ScriptedSettings) -> None:
        self._settings = settings
        self._version = settings.version
        self._receiver: StagedReceiver | None = None
        self._closed = False
        logits_V = np.random.default_rng(settings.seed).normal(size=settings.vocab_size)
        self._logp_V = logits_V - np.log(np.exp(logits_V).sum())

    async def generate(self, prompt: Prompt) -> Rollout:
        """Waits `token_s` per token, and stamps each token with the version of its moment."""
        settings = self._settings
        random = np.random.default_rng((settings.seed, prompt.index))
        longest = settings.max_response_tokens
        wanted = int(random.integers(1, longest + 1)) if settings.length is None else settings.length(prompt.index)
        length = min(wanted, longest)
        ids = random.choice(settings.vocab_size, size=length, p=np.exp(self._logp_V)).astype(np.int32)
        stopped = wanted < longest
        if stopped:
            ids[-1] = settings.end_id
        begun = prompt.begun
        assert begun == 0 or (ids[:begun] == prompt.begun_ids).all(), "what was begun is not this prompt's"
        end = min(length, begun + (settings.piece_tokens or length))
        segments = await self._emit(range(begun, end), prompt.index)
        head_V = np.argsort(-self._logp_V, kind="stable").astype(np.int32)
        head, draws = settings.needs.head, settings.needs.draws
        head_ids = np.tile(head_V[:head], (length, 1))
        tail = np.exp(self._logp_V[head_V[head:]])
        draw_ids = random.choice(head_V[head:], size=(length, draws), p=tail / tail.sum())[begun:end]
        drawn = merge(draw_ids, self._logp(draw_ids)) if draws else (None, None, None, None)
        ids, head_ids = ids[begun:end], head_ids[begun:end]
        return Rollout(
            index=prompt.index,
            prompt_ids=prompt.token_ids,
            response_ids=ids,
            logp=self._logp(ids) if settings.needs.behaviour_logp or draws else None,
            head_ids=head_ids if head else None,
            head_logp=self._logp(head_ids) if head else None,
            draw_ids=drawn[0],
            draw_counts=drawn[1],
            draw_sizes=drawn[2],
            draw_logp=drawn[3],
            segments=segments,
            finish_reason="unfinished" if end < length else "stop" if stopped else "length",
        )

    async def join_transport(self, request: JoinTransport) -> None:
        """Joins as one receiver, in a thread: the loop goes on."""
        self._receiver = await asyncio.to_thread(
            StagedReceiver,
            address=request.address,
            rank=request.first_rank,
            world_size=request.world_size,
            device="cpu",
            timeout_s=self._settings.timeout_s,
        )

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Goes on under `version` when the update is there, at once without a transport."""
        start = time.perf_counter()
        if self._receiver is not None:
            await asyncio.to_thread(self._drain, self._receiver, version)
        self._version = version
        return {"receive": time.perf_counter() - start, "pause": 0.0, "swap": 0.0, "resume": 0.0}

    async def close(self) -> None:
        """Ends running requests with a PeerError."""
        self._closed = True
        if self._receiver is not None:
            self._receiver.close()

    async def _emit(self, tokens: range, index: int) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        for token in tokens:
            if self._closed:
                raise PeerError(f"scripted rollout was closed before it finished prompt {index}")
            if not segments or segments[-1].version != self._version:
                segments.append(Segment(first_token=token, version=self._version))
            await asyncio.sleep(self._settings.token_s)
        return tuple(segments)

    def _logp(self, ids: np.ndarray) -> np.ndarray:
        return self._logp_V[ids].astype(np.float32)

    @staticmethod
    def _drain(receiver: StagedReceiver, version: int) -> None:
        for _ in receiver.receive(receiver.announced(version)):
            continue
