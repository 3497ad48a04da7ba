"""What is refused of models before anything starts; prompts, tokenizers and layouts are refused in tests/run/test_faults.py."""

import pytest
from omegaconf import OmegaConf

from megatron_opd.config import resolve
from megatron_opd.errors import ConfigError
from megatron_opd.preflight import check_configs
from tests.model import tiny

MIXED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


@pytest.fixture
def check(tmp_path):
    """Checks a run with these models."""

    def check(student, teacher, /, **sections):
        paths = {}
        for name, (family, fields) in {"student": student, "teacher": teacher}.items():
            paths[name] = tmp_path / name
            tiny.config(family, **fields).save_pretrained(paths[name])
        base = {name: {"path": str(path)} for name, path in paths.items()}
        sizes = {"data": {"prompts": "p", "max_prompt_tokens": 8}, "rollout": {"max_response_tokens": 8}}
        check_configs(resolve(OmegaConf.create(base | sizes), OmegaConf.create(sections)))

    return check


def test_windows_in_some_layers_are_refused_where_vllm_would_serve_the_model(check):
    plain, mixed = ("qwen2", {}), ("qwen2", MIXED)
    check(plain, mixed)  # Megatron scores
    with pytest.raises(ConfigError, match=r"student .*window of 7 tokens and some do not"):
        check(mixed, plain)
    for sections in ({"teacher": {"backend": "vllm"}}, {"eval": {"prompts": "p"}}):
        with pytest.raises(ConfigError, match=r"teacher .*window of 7 tokens and some do not"):
            check(plain, mixed, **sections)
    check(("qwen2", MIXED | {"max_window_layers": 0}), plain)
