"""Any bytes in a prompt file are prompts or a `DataError` that names file and line; never a crash."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.config import DataConfig
from megatron_opd.data.prompts import end_ids, load_records, load_tokenizer
from megatron_opd.errors import CheckpointError, ConfigError, DataError

CONFIG = DataConfig(prompts="p", max_prompt_tokens=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a", "a b", "a b a b a b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["prompt", "completion", "x"]), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "e": 2, "u": 3}, unk_token="u"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="e", unk_token="u")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts") / "prompts.jsonl"


def is_understood(file, tokenizer, data, *, completions):
    file.write_bytes(data)
    try:
        records = load_records(str(file), tokenizer, CONFIG, completions=completions, max_tokens=6)
    except DataError as error:
        assert str(file) in str(error)
        return
    assert records and all(1 <= len(record.prompt_ids) <= 4 for record in records)
    assert not completions or all(record.completion_ids[-1] == 2 for record in records)


@given(data=st.binary(max_size=60), completions=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes(file, tokenizer, data, completions):
    is_understood(file, tokenizer, data, completions=completions)


@given(lines=st.lists(VALUES, max_size=3), completions=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_json(file, tokenizer, lines, completions):
    is_understood(file, tokenizer, "\n".join(map(json.dumps, lines)).encode(), completions=completions)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\\ud83d"}', "half a character"),
        (b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}", "not valid JSON .*digits"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON .*recursion"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark"),
        (b"[1]", "wanted a JSON object"),
        (b'{"prompt": "a b a b a"}', "prompt has 5 tokens"),
    ],
)
def test_a_bad_line_is_named_by_its_number(file, tokenizer, line, message):
    file.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"{file}:3: .*{message}"):
        load_records(str(file), tokenizer, CONFIG, completions=False)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1.0", "model": {}}'])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer in .* does not load"):
        load_tokenizer(str(tmp_path))


def test_end_ids_come_from_the_generation_config_first(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert end_ids(tmp_path) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert end_ids(tmp_path) == (1, 2)
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_ids(tmp_path) == (1,)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="eos_token_id"):
        end_ids(tmp_path)
