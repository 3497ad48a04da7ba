"""Any bytes in a prompt file are prompts or a `DataError` that names the file; never a crash."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_opd.config import DataConfig
from megatron_opd.data.prompts import load_records
from megatron_opd.errors import DataError

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
