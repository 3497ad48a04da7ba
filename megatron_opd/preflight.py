"""Everything about a run that can be refused before a process starts."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_opd import estimators
from megatron_opd.config import Config
from megatron_opd.data.prompts import Record, load_records, load_tokenizer, require_same_tokens
from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.interfaces import Estimator
from megatron_opd.runtime.imports import load_object


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the checks had to load anyway."""

    tokenizer: PreTrainedTokenizerBase
    records: list[Record]
    heldout: list[Record]


def load_hf_config(path: str) -> PretrainedConfig:
    """config.json of a Hugging Face folder; no code of its is ever run.

    Raises:
        CheckpointError: there is none.
    """
    if not Path(path, "config.json").is_file():
        raise CheckpointError(f"{path} holds no config.json; name a complete Hugging Face folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}/config.json does not load: {error}") from error


def build_estimator(config: Config) -> Estimator:
    """The estimator, once its needs are known to be met by the other sections.

    Raises:
        ConfigError: a need that the config cannot honour, with the remedy.
    """
    estimator = estimators.build(config.estimator.name, config.estimator.settings)
    needs, name, teacher = estimator.needs, config.estimator.name, config.teacher.backend
    if needs.teacher and teacher == "none":
        raise ConfigError(f"estimator {name} needs a teacher; set teacher.backend=megatron or vllm and teacher.path")
    if not needs.teacher and teacher != "none":
        raise ConfigError(f"estimator {name} uses no teacher; set teacher.backend=none")
    if teacher == "vllm" and (needs.teacher_head or needs.teacher_draws):
        raise ConfigError(
            f"estimator {name} needs the teacher at ids that the student chose; vLLM cannot score those: set teacher.backend=megatron"
        )
    if (needs.behaviour_logp or needs.tail_draws) and config.rollout.top_p < 1:
        raise ConfigError(
            f"estimator {name} weighs samples by p/b, which is infinite where "
            f"rollout.top_p={config.rollout.top_p} cuts b to 0; set rollout.top_p=1"
        )
    return estimator


def check(config: Config) -> Checked:
    """Checks models, tokenizers, estimator, prompts and verifier against each other.

    Raises:
        ConfigError, CheckpointError, DataError: the first thing that is wrong and what to do.
    """
    needs = build_estimator(config).needs
    student = load_hf_config(config.student.path)
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if needs.generation and length > student.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {length} exceeds "
            f"the student's {student.max_position_embeddings} positions"
        )
    if config.teacher.backend != "none":
        teacher = load_hf_config(config.teacher.path)
        if student.vocab_size > teacher.vocab_size:
            raise ConfigError(
                f"the student's vocab_size={student.vocab_size} exceeds the teacher's {teacher.vocab_size}: the teacher cannot score every "
                f"id that the student may sample; remove the student's unused embedding rows"
            )
        require_same_tokens(config.student.path, config.teacher.path)
    tokenizer = load_tokenizer(config.student.path)
    records = load_records(config.data.prompts, tokenizer, config.data, completions=not needs.generation)
    heldout = load_records(config.eval.prompts, tokenizer, config.data, completions=False) if config.eval.prompts else []
    if config.eval.verifier:
        load_object(config.eval.verifier, "eval.verifier")
    return Checked(tokenizer=tokenizer, records=records, heldout=heldout[: config.eval.limit or None])
