"""Sampling with vLLM: one engine in a process of its own, its requests, its weight updates. Knows no learner and no loop."""

import asyncio
import gc
import json
import os
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from megatron_opd.config import RolloutConfig
from megatron_opd.data.draws import merge
from megatron_opd.data.prompts import end_ids
from megatron_opd.errors import ConfigError, OPDError, PeerError, WeightSyncError
from megatron_opd.rollout import draws, worker
from megatron_opd.runtime.environment import check_packages
from megatron_opd.types import JoinTransport, Needs, Prompt, Rollout, Segment

T = TypeVar("T")

_POLL_S = 0.01  # between two questions whether an update is there
_PATIENCE = 3  # times timeout_s: a worker may itself wait timeout_s for the learner, more than once, before it answers


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one rollout engine is."""

    rollout: RolloutConfig
    path: str  # Hugging Face folder of the student
    needs: Needs
    max_model_len: int  # tokens, prompt and response together
    device: str = "cpu"  # "cpu" | "cuda"
    seed: int = 0  # with it, a prompt's index says what is drawn for it, whichever replica does it and whatever runs beside it
    version: int = 0  # optimizer steps behind the weights in `path`
    timeout_s: float = 120.0  # of any single answer from engine or transport

    def __post_init__(self) -> None:
        _stop_token_ids(self.path)  # a model that cannot end is told of before its engine starts
        if self.needs.head + self.needs.draws > 0 and self.rollout.top_p < 1:
            raise ConfigError(
                f"rollout.top_p={self.rollout.top_p} cuts the distribution that head and tail draws are taken from; "
                "set rollout.top_p=1 or use an estimator that needs neither"
            )
        vocabulary = json.loads((Path(self.path) / "config.json").read_text())["vocab_size"]
        if self.needs.head + (self.needs.draws > 0) > vocabulary:
            raise ConfigError(
                f"a head of {self.needs.head} ids leaves no tail to draw from in a vocabulary of {vocabulary}; use a smaller head"
            )


class VLLMRollout:
    """`RolloutBackend` around vLLM's AsyncLLM. Make it with `start`; `generate` may run many times at once.

    With `rollout.keep_kv` running requests go on with the KV cache of old weights after an update. vLLM cannot empty its
    prefix cache while it keeps theirs, so prefix caching is off then: new prompts never meet stale keys. Without it running
    requests are preempted and re-prefilled under the new weights, and the prefix cache is emptied with them.
    """

    def __init__(self, settings: EngineSettings, engine: AsyncLLM, pid: int) -> None:
        self._settings = settings
        self._engine = engine
        self._name = f"rollout engine (pid {pid})"
        self._width = settings.needs.head + settings.needs.draws
        self._numbers = count()
        self._running: set[asyncio.Task] = set()
        self._finished: dict[str, tuple[int, asyncio.Future]] = {}  # key -> length; draws not asked for yet
        self._fetching = asyncio.Lock()

    @classmethod
    async def start(cls, settings: EngineSettings) -> "VLLMRollout":
        """Starts the engine process and loads the model; blocks the event loop meanwhile.

        Call it in the main thread: the engine dies with the thread that started it.

        Raises:
            PeerError: the engine process ended before it was ready; its own words stand above in the log.
        """
        check_packages()
        try:
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(settings)))
        except RuntimeError as failure:
            raise PeerError(f"rollout engine for {settings.path} did not start: {failure}") from failure
        async with asyncio.timeout(settings.timeout_s):
            pids = await engine.collective_rpc("opd_die_with", args=(os.getpid(),))
            await engine.update_weight_version(str(settings.version))
        return cls(settings, engine, pids[0])

    async def generate(self, prompt: Prompt) -> Rollout:
        """Samples one response, or its next piece.

        Waits for the engine as long as it answers at all: every `timeout_s` it is asked whether it still turns.

        Raises:
            PeerError: the engine died or hangs, or was closed.
        """
        task = asyncio.create_task(self._generate(prompt))
        self._running.add(task)
        try:
            while not (await asyncio.wait({task}, timeout=self._settings.timeout_s))[0]:
                await self._ask("answer", self._engine.is_paused())
            if task.cancelled():
                raise PeerError(f"{self._name} was closed before it finished prompt {prompt.index}")
            return task.result()
        finally:
            task.cancel()
            self._running.discard(task)

    async def join_transport(self, request: JoinTransport) -> None:
        """Joins the learner's weight transport with all workers of this engine.

        Raises:
            PeerError: the learner does not listen there.
        """
        place = (request.address.host, request.address.port, request.first_rank, request.world_size, self._settings.timeout_s)
        await self._ask("join the weight transport", self._engine.collective_rpc("opd_join", args=place))

    async def receive_weights(self, version: int) -> dict[str, float]:
        """Receives, verifies and loads beside generation, then pauses between two tokens, swaps, resumes.

        Returns:
            seconds: "receive" (wait for the learner, network, load), during which requests run on; "pause" (finish the current
            step, empty caches), "swap", "resume", during which they stand still.

        Raises:
            WeightSyncError: the update failed. The weights are still the old ones, whole, but the transport is closed.
            PeerError: the swap failed. Nobody knows which weights each worker has: the engine must not go on.
        """
        engine, seconds = self._engine, {}

        async def part(name: str, what: str, call: Awaitable[T]) -> T:
            start = time.perf_counter()
            error = WeightSyncError if name == "receive" else PeerError
            answer = await self._ask(f"{what} version {version}", call, error=error)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return answer

        await part("receive", "begin to receive", engine.collective_rpc("opd_begin_update", args=(version,)))
        while not all(await part("receive", "receive", engine.collective_rpc("opd_update_ready"))):
            await part("receive", "wait for", asyncio.sleep(_POLL_S))
        # AsyncLLM's own pause sleeps 20 ms after this, "not required for correctness".
        clear_cache = not self._settings.rollout.keep_kv
        await part("pause", "pause for", engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=clear_cache))
        await part("swap", "swap in", engine.collective_rpc("opd_swap"))
        await part("swap", "name", engine.update_weight_version(str(version)))
        await part("resume", "resume with", engine.resume_generation())
        return seconds

    async def close(self) -> None:
        """Gives up what still runs and ends the engine process, by force if it takes longer than `timeout_s`; blocks the loop meanwhile."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=self._settings.timeout_s)
        self._engine.shutdown(timeout=self._settings.timeout_s)
        gc.collect()  # the engine object sits in a cycle, and its finalizer fails if it runs as late as interpreter exit

    async def _generate(self, prompt: Prompt) -> Rollout:
        key = f"{prompt.index}-{next(self._numbers)}"
        params = sampling_params(self._settings, key, prompt)
        try:
            outputs = [o async for o in self._engine.generate(tokens_of(prompt), params, key)]
        except Exception as failure:  # vLLM wraps whatever happened in the engine into its own unrelated types
            raise PeerError(f"{self._name} failed on prompt {prompt.index}: {failure}") from failure
        completion = outputs[-1].outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise PeerError(f"{self._name} gave up prompt {prompt.index} with finish reason {completion.finish_reason!r}")
        recorded = await self._take(key, len(completion.token_ids)) if self._width else None
        return rollout_of(self._settings, prompt, completion, recorded)

    async def _take(self, key: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws of a finished request. Whoever holds the lock asks for all that have finished so far: one call for many."""
        future = asyncio.get_running_loop().create_future()
        self._finished[key] = (length, future)
        async with self._fetching:
            if not future.done():
                await asyncio.sleep(0)  # lets the others that finished in the same engine step sign up
                await self._fetch()
        return future.result()

    async def _fetch(self) -> None:
        batch, self._finished = self._finished, {}
        lengths = [length for length, _ in batch.values()]
        futures = [future for _, future in batch.values()]
        try:
            blobs = await self._ask("hand over draws", self._engine.collective_rpc("opd_take_draws", args=(list(batch), lengths)))
            for future, recorded in zip(futures, draws.decode(blobs[0], lengths, self._width)):
                future.set_result(recorded)
        finally:
            for future in futures:
                if not future.done():
                    future.set_exception(PeerError(f"{self._name} did not hand over the draws of a finished request"))
                    future.exception()  # not every waiter may come to look

    async def _ask(self, what: str, call: Awaitable[T], *, error: type[OPDError] = PeerError) -> T:
        limit_s = _PATIENCE * self._settings.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await call
        except TimeoutError as failure:
            raise error(f"{self._name} did not {what} within {limit_s:g} s") from failure
        except Exception as failure:  # vLLM hands on a worker's exception as a bare Exception with its text
            raise error(f"{self._name} could not {what}: {failure}") from failure


@cache
def _stop_token_ids(path: str) -> list[int]:
    """Read once, not for every request."""
    return list(end_ids(path))


def tokens_of(prompt: Prompt) -> TokensPrompt:
    """What the model reads before it goes on."""
    begun = [] if prompt.begun_ids is None else prompt.begun_ids.tolist()
    return TokensPrompt(prompt_token_ids=prompt.token_ids.tolist() + begun)


def sampling_params(settings: EngineSettings, key: str, prompt: Prompt) -> SamplingParams:
    """How the request of a prompt is sampled; `key` names what is recorded beside it."""
    rollout, needs, begun = settings.rollout, settings.needs, prompt.begun
    (seed,) = np.random.SeedSequence((settings.seed, prompt.index, *([begun] if begun else []))).generate_state(1)
    left = rollout.max_response_tokens - begun
    return SamplingParams(
        seed=int(seed),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=min(left, rollout.piece_tokens or left),
        stop_token_ids=_stop_token_ids(settings.path),
        logprobs=0 if needs.behaviour_logp or needs.draws else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={draws.KEY: key} if needs.head + needs.draws else None,
    )


def rollout_of(
    settings: EngineSettings, prompt: Prompt, completion: CompletionOutput, recorded: tuple[np.ndarray, np.ndarray] | None
) -> Rollout:
    """A finished request as the rest of the house knows it; `recorded` are ids and log-probs [R, head + draws]."""
    head, needs, begun = settings.needs.head, settings.needs, prompt.begun
    is_cut = completion.finish_reason == "length" and begun + len(completion.token_ids) < settings.rollout.max_response_tokens
    ids, logp = recorded if recorded is not None else (None, None)
    drawn = merge(ids[:, head:], logp[:, head:]) if needs.draws else (None, None, None, None)
    return Rollout(
        index=prompt.index,
        prompt_ids=prompt.token_ids,
        response_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logp=None if completion.logprobs is None else np.asarray(completion.logprobs.logprobs, dtype=np.float32),
        head_ids=ids[:, :head] if head else None,
        head_logp=logp[:, :head] if head else None,
        draw_ids=drawn[0],
        draw_counts=drawn[1],
        draw_sizes=drawn[2],
        draw_logp=drawn[3],
        segments=tuple(Segment(first_token=begun + s.start, version=int(s.version)) for s in completion.weight_versions if s.end > s.start),
        finish_reason="unfinished" if is_cut else completion.finish_reason,
    )


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """What any vLLM engine for rollouts is made with."""
    rollout, needs = settings.rollout, settings.needs
    recorder = {"head": needs.head, "draws": needs.draws}
    recording = needs.head + needs.draws > 0
    return {
        "model": settings.path,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # the folder's own temperature and top-k are for chatting
        "dtype": rollout.dtype,
        "seed": settings.seed,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": rollout.max_running,
        "kv_cache_memory_bytes": rollout.kv_cache_bytes,
        "tensor_parallel_size": rollout.tensor_parallel,
        "enable_prefix_caching": not rollout.keep_kv,
        "enforce_eager": settings.device == "cpu",
        # A seeded request's draw for a prompt that was read in part is taken back, which vLLM cannot do with generators on CPU: read whole.
        **(
            {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, settings.max_model_len)}
            if settings.device == "cpu"
            else {}
        ),
        "logprobs_mode": "processed_logprobs",
        "logits_processors": [draws.NAME] if recording else None,
        "additional_config": {draws.KEY: recorder} if recording else {},
        "worker_extension_cls": worker.EXTENSION,
        "disable_log_stats": True,
    }
