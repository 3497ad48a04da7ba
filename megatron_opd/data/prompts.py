"""Prompt files: JSON lines in, token ids out, every bad line refused with its file and number before the run starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_opd.config import DataConfig
from megatron_opd.errors import CheckpointError, ConfigError, DataError
from megatron_opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a prompt file."""

    fields: dict[str, Any]  # the line as it stands, for the verifier
    prompt_ids: np.ndarray  # [P] int32
    completion_ids: np.ndarray | None  # [R] int32, ends with the end-of-sequence id


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder.

    Raises:
        CheckpointError: there is none, or it has no end-of-sequence token.
    """
    if not Path(path, "tokenizer.json").is_file():
        raise CheckpointError(f"{path} holds no tokenizer.json; name a complete Hugging Face folder")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)  # the file as it stands; AutoTokenizer rebuilds it for some model types
    except (OSError, ValueError, KeyError, TypeError) as error:  # the file is read by others, and may hold anything
        raise CheckpointError(f"the tokenizer in {path} does not load: {type(error).__name__}: {error}; copy it anew") from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer in {path} has no eos_token; responses could never end")
    return tokenizer


def end_ids(path: str | Path) -> tuple[int, ...]:
    """The ids that end a response: those of generation_config.json, else of config.json.

    Raises:
        ConfigError: neither file names one.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(path) / name
        ids = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    raise ConfigError(f"neither generation_config.json nor config.json in {path} has an eos_token_id; add it, else no response can end")


def require_same_tokens(student: str, teacher: str) -> None:
    """Token ids must mean the same to both models.

    Raises:
        ConfigError: naming the first token on which they differ.
    """
    ours, theirs = load_tokenizer(student).get_vocab(), load_tokenizer(teacher).get_vocab()
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != token_id:
            raise ConfigError(
                f"student and teacher tokenize differently: {token!r} is id {token_id} in {student} but {theirs.get(token)} in {teacher}; "
                f"on-policy distillation compares token by token, so choose a teacher of the same tokenizer"
            )


def load_records(
    path: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, *, completions: bool, max_tokens: int = 2**31
) -> list[Record]:
    """All lines of a prompt file, tokenized; with `completions`, prompt and completion together have `max_tokens` at most.

    Raises:
        DataError: a line is no JSON object, lacks a field, is empty or too long: file, line number and remedy.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"prompt file {path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            records.append(_record(line, f"{path}:{number}", tokenizer, config, completions))
            length = len(records[-1].prompt_ids) + (len(records[-1].completion_ids) if completions else 0)
            if length > max_tokens:
                raise DataError(
                    f"{path}:{number}: prompt and completion have {length} tokens, wanted {max_tokens} at most: the model's positions"
                )
    if not records:
        raise DataError(f"prompt file {path} holds no prompts")
    return records


def _record(line: bytes, place: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, completions: bool) -> Record:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 ({error}); convert the file") from error
    except (ValueError, RecursionError) as error:  # besides what is no JSON, numbers of thousands of digits and towers of brackets
        raise DataError(f"{place}: not valid JSON ({error}); write one object per line, without a byte order mark") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: got {type(fields).__name__}, wanted a JSON object")
    text = _text(fields, config.prompt_field, place, "data.prompt_field")
    if config.chat_template:
        if not tokenizer.chat_template:
            raise DataError("data.chat_template=true, but the student's tokenizer has no chat template; add one or set it to false")
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(text)
    if not 0 < len(ids) <= config.max_prompt_tokens:
        raise DataError(f"{place}: prompt has {len(ids)} tokens, wanted 1 to {config.max_prompt_tokens} (data.max_prompt_tokens)")
    completion = None
    if completions:
        answer = _text(fields, config.completion_field, place, "data.completion_field")
        completion = np.array([*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id], np.int32)
    return Record(fields=fields, prompt_ids=np.array(ids, np.int32), completion_ids=completion)


def _text(fields: dict[str, Any], name: str, place: str, setting: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {name!r} ({setting}) is {value!r:.40}, wanted a text; the line has {', '.join(fields) or 'no fields'}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write down half a character, as \ud83d
        raise DataError(f"{place}: field {name!r} ({setting}) holds half a character ({error}); remove the lone surrogate") from error
    return value


class PromptSource:
    """An endless, reproducible order over records: `prompt(index)` is a pure function of index and seed."""

    def __init__(self, records: list[Record], *, seed: int, shuffle: bool) -> None:
        self._records = records
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order = np.arange(len(records))

    def prompt(self, index: int) -> Prompt:
        """The prompt at a cursor position that grows for ever."""
        epoch, offset = divmod(index, len(self._records))
        if self._shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._records))
        record = self._records[self._order[offset]]
        return Prompt(index=index, token_ids=record.prompt_ids, completion_ids=record.completion_ids)
