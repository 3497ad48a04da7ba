"""Everything about a run that can be refused before a process starts."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_opd import estimators
from megatron_opd.config import Config
from megatron_opd.data.prompts import Record, end_ids, load_records, load_tokenizer, require_same_tokens
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
    _check_needs(name, needs)
    if config.loop.exact_lag and not needs.generation:
        raise ConfigError(f"estimator {name} trains on given completions, which have no lag; set loop.exact_lag=false")
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


def with_estimator_settings(config: Config) -> Config:
    """The same config, with the settings that the estimator has by default written out.

    Raises:
        ConfigError: an unknown estimator or setting. What `build_estimator` checks beyond that is not checked here.
    """
    chosen = config.estimator
    settings = asdict(estimators.build(chosen.name, chosen.settings))
    plus_settings = asdict(estimators.build(chosen.plus, chosen.plus_settings)) if chosen.plus else {}
    return replace(config, estimator=replace(chosen, settings=settings, plus_settings=plus_settings))


def _check_needs(name: str, needs: Needs) -> None:
    """An estimator of the user's own may ask for what cannot be."""
    scored = {"teacher_head": needs.head, "head_rest": needs.teacher_head, "teacher_draws": needs.draws, "top_rest": needs.teacher_top}
    for wanted, on in scored.items():
        if getattr(needs, wanted) and not on:
            raise ConfigError(f"estimator {name} needs {wanted} of ids that it does not ask for; see megatron_opd/types.py, Needs")
    if not needs.generation and (needs.behaviour_logp or needs.head or needs.draws):
        raise ConfigError(f"estimator {name} needs generation=False and what only a rollout knows; choose one")


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
    check_configs(config)
    needs, student = build_estimator(config).needs, load_hf_config(config.student.path)
    for path, hf_config in _models(config):
        with SafetensorsFolder(path) as files:  # opens headers only
            files.check(hf_manifest(hf_config, "float32"))
    tokenizer = load_tokenizer(config.student.path)
    if config.teacher.backend != "none":
        require_same_tokens(config.student.path, config.teacher.path)
    positions = student.max_position_embeddings
    records = load_records(config.data.prompts, tokenizer, config.data, completions=not needs.generation, max_tokens=positions)
    heldout = load_heldout(config, tokenizer)
    if config.eval.verifier:
        _check_verifier(config.eval.verifier, heldout[0])
    if needs.generation:
        end_ids(config.student.path)
    return Checked(records=records, heldout=heldout)


def check_configs(config: Config) -> None:
    """The part of `check` that reads of a model's folder config.json alone: no weights, no tokenizer, no prompts.

    Raises:
        ConfigError, CheckpointError: see `check`.
    """
    needs = build_estimator(config).needs
    student = load_hf_config(config.student.path)
    learner = config.learner
    _check_split(
        "student",
        config.student.path,
        student,
        tensor=learner.tensor_parallel,
        pipeline=learner.pipeline_parallel,
        expert=learner.expert_parallel,
        layers=learner.pipeline_layers,
    )
    architecture(student).require_trainable(tensor=learner.tensor_parallel, sequence_parallel=learner.sequence_parallel)
    if needs.generation:
        architecture(student).require_divisible(tensor=config.rollout.tensor_parallel, pipeline=1)
    if needs.generation or config.eval.prompts:
        _check_length(config, "student", student)
        _check_served("student", config.student.path, student)
    widest = max(needs.head + (needs.draws > 0), needs.teacher_top)
    if widest > student.vocab_size:
        raise ConfigError(f"estimator {config.estimator.name} asks for {widest} ids of a vocabulary of {student.vocab_size}; ask for fewer")
    if config.teacher.backend != "none":
        _check_teacher(config, student)


def _models(config: Config) -> list[tuple[str, PretrainedConfig]]:
    paths = [config.student.path] + ([config.teacher.path] if config.teacher.backend != "none" else [])
    return [(path, load_hf_config(path)) for path in paths]


def _check_verifier(name: str, record: Record) -> None:
    """Calls it once: hours later is too late for what it lacks."""
    verifier = load_object(name, "eval.verifier")
    try:
        verdict = float(verifier(record.fields, ""))
    except Exception as error:  # the user's own function may raise anything
        raise ConfigError(
            f"eval.verifier={name} must be callable as verifier(record, completion); on the first held-out record and an empty completion "
            f"it raised {type(error).__name__}: {error}"
        ) from error
    if not 0 <= verdict <= 1:
        raise ConfigError(f"eval.verifier={name} returned {verdict} for the first held-out record, wanted a number from 0 to 1")


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
    if config.eval.prompts and settings.pipeline_parallel > 1:
        raise ConfigError(
            f"the evaluation scores with vLLM on teacher.tensor_parallel={settings.tensor_parallel} ranks alone, not on "
            f"teacher.pipeline_parallel={settings.pipeline_parallel} times as many; set eval.prompts= and evaluate the export by itself"
        )
    _check_length(config, "teacher", teacher)
    if settings.backend == "vllm" or config.eval.prompts:
        _check_served("teacher", settings.path, teacher)
    _check_split("teacher", settings.path, teacher, tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel)


def _check_split(name: str, path: str, hf_config: PretrainedConfig, **split: Any) -> None:
    try:
        architecture(hf_config).require_divisible(**split)
    except ConfigError as error:
        raise ConfigError(f"{name} {path}: {error}") from error


def _check_served(name: str, path: str, hf_config: PretrainedConfig) -> None:
    """What vLLM would refuse once its engine has started."""
    if hf_config.model_type in ("qwen2", "qwen3") and len(set(architecture(hf_config).windows)) > 1:
        raise ConfigError(
            f"{name} {path}: some of its layers attend through a window of {hf_config.sliding_window} tokens and some do not, which vLLM "
            f"cannot do for a {hf_config.model_type}; choose a model with use_sliding_window=false"
        )


def _check_length(config: Config, name: str, hf_config: PretrainedConfig) -> None:
    """One position more than prompt and response: a vLLM teacher generates a token that nobody reads."""
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens + 1
    if length > hf_config.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens + 1 = {length} exceeds "
            f"the {name}'s {hf_config.max_position_embeddings} positions; lower one of them"
        )
