"""Everything about a run that can be refused before a process starts."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_opd import estimators
from megatron_opd.config import Config
from megatron_opd.data.prompts import Record, load_records, load_tokenizer, require_same_tokens
from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.estimators.mix import Mix
from megatron_opd.interfaces import Estimator
from megatron_opd.runtime.imports import load_object
from megatron_opd.types import Needs
from megatron_opd.weights.architectures import architecture
from megatron_opd.weights.files import SafetensorsFolder
from megatron_opd.weights.mapping import hf_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the checks had to load anyway."""

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
    chosen = config.estimator
    estimator = estimators.build(chosen.name, chosen.settings)
    if chosen.plus:
        second = estimators.build(chosen.plus, chosen.plus_settings)
        estimator = Mix(first=estimator, second=second, first_weight=chosen.weight, second_weight=chosen.plus_weight)
    elif chosen.weight != 1:
        raise ConfigError(f"estimator.weight={chosen.weight} weighs the first of two estimators; name the second as estimator.plus")
    needs, teacher = estimator.needs, config.teacher.backend
    name = " + ".join(filter(None, (chosen.name, chosen.plus)))
    if needs.teacher and teacher == "none":
        raise ConfigError(f"estimator {name} needs a teacher; set teacher.backend=megatron or vllm and teacher.path")
    if not needs.teacher and teacher != "none":
        raise ConfigError(f"estimator {name} uses no teacher; set teacher.backend=none")
    if teacher == "vllm" and (needs.teacher_head or needs.teacher_draws or needs.divergence):
        wanted = "hidden states of the teacher" if needs.divergence else "the teacher at ids that the student chose"
        raise ConfigError(f"estimator {name} needs {wanted}; vLLM does not give them: set teacher.backend=megatron")
    if (needs.behaviour_logp or needs.draws or needs.head) and config.rollout.top_p < 1:
        raise ConfigError(
            f"estimator {name} corrects by p/b or sums over the head of b, which are wrong where "
            f"rollout.top_p={config.rollout.top_p} cuts b to 0; set rollout.top_p=1"
        )
    return estimator


def needs_of(config: Config) -> Needs:
    """What rollouts and teachers must deliver: for the estimator, and for the run's diagnostics where the teacher can.

    A learner that gets hidden states finds entropy and arg-max itself; vLLM does not know the entropy.
    """
    needs = build_estimator(config).needs
    moments = config.learner.moments and needs.teacher and needs.divergence is None and config.teacher.backend == "megatron"
    return replace(needs, moments=moments)


def check(config: Config) -> Checked:
    """Checks models, tokenizers, estimator, prompts and verifier against each other.

    Raises:
        ConfigError, CheckpointError, DataError: the first thing that is wrong and what to do.
    """
    needs = build_estimator(config).needs
    student = load_hf_config(config.student.path)
    _check_model("student", config.student.path, student, tensor=config.learner.tensor_parallel, pipeline=config.learner.pipeline_parallel)
    if needs.generation:
        architecture(student).require_divisible(tensor=config.rollout.tensor_parallel, pipeline=1)
        _check_length(config, "student", student)
    widest = max(needs.head + (needs.draws > 0), needs.teacher_top)
    if widest > student.vocab_size:
        raise ConfigError(f"estimator {config.estimator.name} asks for {widest} ids of a vocabulary of {student.vocab_size}; ask for fewer")
    if config.teacher.backend != "none":
        _check_teacher(config, student)
    tokenizer = load_tokenizer(config.student.path)
    positions = student.max_position_embeddings
    records = load_records(config.data.prompts, tokenizer, config.data, completions=not needs.generation, max_tokens=positions)
    if config.eval.prompts:
        _check_length(config, "student", student)
    if config.eval.verifier:
        load_object(config.eval.verifier, "eval.verifier")
    return Checked(records=records, heldout=load_heldout(config, tokenizer))


def load_heldout(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Record]:
    """The held-out prompts that `eval` names, none if it names none.

    Raises:
        DataError: see `load_records`.
    """
    if not config.eval.prompts:
        return []
    heldout = load_records(config.eval.prompts, tokenizer, config.data, completions=False)
    return heldout[: config.eval.limit or None]


def _check_teacher(config: Config, student: PretrainedConfig) -> None:
    settings, teacher = config.teacher, load_hf_config(config.teacher.path)
    if student.vocab_size > teacher.vocab_size:
        raise ConfigError(
            f"the student's vocab_size={student.vocab_size} exceeds the teacher's {teacher.vocab_size}: the teacher cannot score every "
            f"id that the student may sample; remove the student's unused embedding rows"
        )
    if settings.backend == "vllm" and student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"the teacher's vocab_size={teacher.vocab_size} is not the student's {student.vocab_size}, and vLLM cannot leave out the ids "
            f"that the student lacks; set teacher.backend=megatron"
        )
    require_same_tokens(config.student.path, settings.path)
    _check_length(config, "teacher", teacher)
    _check_model("teacher", settings.path, teacher, tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel)


def _check_model(name: str, path: str, hf_config: PretrainedConfig, *, tensor: int, pipeline: int) -> None:
    """Opens headers only: names, shapes and how they divide."""
    try:
        architecture(hf_config).require_divisible(tensor=tensor, pipeline=pipeline)
    except ConfigError as error:
        raise ConfigError(f"{name} {path}: {error}") from error
    with SafetensorsFolder(path) as files:
        files.check(hf_manifest(hf_config, "float32"))


def _check_length(config: Config, name: str, hf_config: PretrainedConfig) -> None:
    """One position more than prompt and response: a vLLM teacher generates a token that nobody reads."""
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens + 1
    if length > hf_config.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens + 1 = {length} exceeds "
            f"the {name}'s {hf_config.max_position_embeddings} positions; lower one of them"
        )
