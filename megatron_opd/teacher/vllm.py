"""Scoring with vLLM: the teacher's log-probabilities of generated tokens and its top K, from prompt log-probabilities.

vLLM's V1 model runner reports, per prompt token, that token and the K largest; it cannot look up other ids.
"""

from collections.abc import Sequence

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt

from megatron_opd.config import TeacherConfig
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.environment import check_packages
from megatron_opd.types import Needs, Rollout, TeacherScores


class VLLMTeacher:
    """`TeacherBackend` around vLLM's synchronous LLM, in this process. Calls block; it never waits for a peer."""

    def __init__(self, config: TeacherConfig, *, needs: Needs, max_model_len: int, device: str = "cpu", seed: int = 0) -> None:
        """Loads the model; `max_model_len` counts prompt and response.

        Raises:
            ConfigError: `needs` asks for ids that vLLM cannot look up.
        """
        unserved = [name for name in ("teacher_head", "teacher_draws", "divergence", "moments") if getattr(needs, name)]
        if unserved:
            raise ConfigError(
                f"teacher.backend=vllm knows log-probabilities of the token and its top K, but {' and '.join(unserved)} is asked for; "
                "set teacher.backend=megatron"
            )
        check_packages()
        self._needs = needs
        self._llm: LLM | None = LLM(
            model=config.path,
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            generation_config="vllm",
            dtype=config.dtype,
            seed=seed,
            max_model_len=max_model_len + 1,  # vLLM generates one token, which nobody reads
            max_num_batched_tokens=config.batch_tokens,  # also the rows of [*, V] log-probabilities that exist at a time
            max_num_seqs=min(64, config.batch_tokens),
            kv_cache_memory_bytes=config.kv_cache_bytes,
            tensor_parallel_size=config.tensor_parallel,
            enable_prefix_caching=False,  # prompt log-probabilities never read it
            enforce_eager=device == "cpu",
            max_logprobs=max(1, needs.teacher_top),
            disable_log_stats=True,
        )
        self._params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=needs.teacher_top if needs.teacher_top else 0,
            flat_logprobs=True,  # a dict per token is two to four times slower
            detokenize=False,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Scores in one batch; entry r of every result belongs to the distribution that predicts response token r."""
        prompts = [TokensPrompt(prompt_token_ids=[*r.prompt_ids.tolist(), *r.response_ids.tolist()]) for r in rollouts]
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        return [self._scores(rollout, output) for rollout, output in zip(rollouts, outputs, strict=True)]

    def close(self) -> None:
        """Ends the engine and frees its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _scores(self, rollout: Rollout, output: RequestOutput) -> TeacherScores:
        """A row is: the token itself, then the K largest by rank."""
        flat, top = output.prompt_logprobs, self._needs.teacher_top
        first = len(rollout.prompt_ids)
        starts = np.asarray(flat.start_indices[first:])
        ids = np.asarray(flat.token_ids, dtype=np.int32)
        logp = np.asarray(flat.logprobs, dtype=np.float32)
        columns = starts[:, None] + np.arange(1, top + 1)
        assert len(starts) == len(rollout.response_ids), "one row of log-probabilities per response token"
        return TeacherScores(
            index=rollout.index,
            token_logp=logp[starts] if self._needs.teacher_token else None,
            top_ids=ids[columns] if top else None,
            top_logp=logp[columns] if top else None,
        )
