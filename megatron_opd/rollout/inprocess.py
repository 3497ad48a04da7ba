"""Sampling with vLLM inside the learner's own processes: batch by batch, in turns with training. Knows no learner and no loop.

The engine spans all ranks of the learner's default process group, and every rank calls every method alike. It is made before
Megatron-Core's CPU answers are installed, which vLLM's start-up would otherwise meet, and ends with its process: its own
shutdown would take the process group away from the learner.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from vllm import LLM

from megatron_opd.errors import PeerError
from megatron_opd.rollout import draws
from megatron_opd.rollout.engine import EngineSettings, engine_arguments, rollout_of, sampling_params, tokens_of
from megatron_opd.runtime.environment import check_packages
from megatron_opd.types import Prompt, Rollout


class InProcessRollout:
    """vLLM's synchronous engine on this rank. Calls block; it never waits for a peer."""

    def __init__(self, settings: EngineSettings, *, rank: int) -> None:
        """Loads the model, which `rollout.tensor_parallel` ranks share; this one is `rank`."""
        check_packages()
        self._settings = settings
        self._on_gpu = settings.device == "cuda"
        launcher = {}  # vLLM takes a default process group of one rank as it is
        if settings.rollout.tensor_parallel > 1:  # of more it wants to be told that somebody else launched them
            os.environ.update(RANK=str(rank), LOCAL_RANK="0")  # a process sees its own devices only
            launcher["distributed_executor_backend"] = "external_launcher"
        self._llm = LLM(**engine_arguments(settings), **launcher, enable_sleep_mode=self._on_gpu)
        self._engine = self._llm.llm_engine
        self._awake = True
        self.version = settings.version
        self._engine.set_weight_version(str(self.version))

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Rollout]:
        """One response to each prompt, in the order in which they end; run the iterator to its end."""
        self._wake()
        asked = {f"{self.version}-{prompt.index}": prompt for prompt in prompts}
        for key, prompt in asked.items():
            self._engine.add_request(key, tokens_of(prompt), sampling_params(self._settings, key, prompt))
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if not output.finished:
                    continue
                prompt, completion = asked[output.request_id], output.outputs[0]
                if completion.finish_reason not in ("stop", "length"):
                    raise PeerError(f"the engine gave up prompt {prompt.index} with finish reason {completion.finish_reason!r}")
                yield rollout_of(self._settings, prompt, completion, self._recorded(output.request_id, len(completion.token_ids)))

    def load(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Takes over the full tensors of `version` under their Hugging Face names; returns seconds by part."""
        start = time.perf_counter()
        self._wake(tags=["weights"])
        self._llm.collective_rpc("opd_load", args=(iter(tensors),))
        self._engine.set_weight_version(str(version))
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self.version = version
        return {"swap": time.perf_counter() - start}

    def sleep(self) -> None:
        """Gives the device's memory to the learner; the weights go to the host, the KV cache is forgotten. Nothing on CPU."""
        if self._on_gpu and self._awake:
            self._llm.sleep(level=1)
            self._awake = False

    def _wake(self, tags: list[str] | None = None) -> None:
        if self._on_gpu and not self._awake:
            self._awake = bool(self._llm.wake_up(tags))

    def _recorded(self, key: str, length: int) -> tuple | None:
        width = self._settings.needs.head + self._settings.needs.draws
        if not width:
            return None
        blob = self._llm.collective_rpc("opd_take_draws", args=([key], [length]))[0]
        return draws.decode(blob, [length], width)[0]
