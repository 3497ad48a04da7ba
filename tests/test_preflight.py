"""What is refused of models before anything starts; prompts, tokenizers and layouts are refused in tests/run/test_faults.py."""

import pytest
from omegaconf import OmegaConf

from megatron_opd.config import resolve
from megatron_opd.errors import ConfigError
from megatron_opd.preflight import build_estimator, check_configs
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


@pytest.mark.parametrize(
    ("name", "settings", "sections", "message"),
    [
        ("sampled_reverse_kl", {}, {"rollout": {"top_p": 0.9}}, r"sampled_reverse_kl corrects by p/b .*set rollout\.top_p=1"),
        ("head_tail_reverse_kl", {}, {"rollout": {"top_p": 0.9}}, r"head_tail_reverse_kl .*set rollout\.top_p=1"),
        ("reverse_kl_topk", {}, {"rollout": {"top_p": 0.9}}, r"reverse_kl_topk .*set rollout\.top_p=1"),
        ("sampled_reverse_kl", {"draws": 4}, {"teacher": {"backend": "vllm"}}, r"chose; .*set teacher\.backend=megatron"),
        ("reverse_kl_topk", {}, {"teacher": {"backend": "vllm"}}, r"the teacher at ids that the student chose"),
        ("dense_kl", {}, {"teacher": {"backend": "vllm"}}, r"hidden states of the teacher; vLLM does not give them"),
        ("forward_kl_topk", {}, {"teacher": {"backend": "none"}}, r"forward_kl_topk needs a teacher; set teacher\.backend"),
        ("sft", {}, {}, r"sft uses no teacher; set teacher\.backend=none"),
        ("sft", {}, {"teacher": {"backend": "none"}, "loop": {"exact_lag": True}}, r"trains on given completions, which have no lag"),
        ("forward_kl_topk", {}, {"estimator": {"weight": 0.5}}, r"estimator\.weight=0\.5 weighs the first of two"),
    ],
)  # fmt: skip
def test_what_an_estimator_needs_and_does_not_get_is_refused_with_the_remedy(name, settings, sections, message):
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "estimator": {"name": name, "settings": settings}}
    with pytest.raises(ConfigError, match=message):
        build_estimator(resolve(OmegaConf.create(base), OmegaConf.create(sections)))


def test_forward_kl_may_be_sampled_from_a_nucleus():
    base = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}, "rollout": {"top_p": 0.9}}
    build_estimator(resolve(OmegaConf.create(base | {"estimator": {"name": "forward_kl_topk"}})))
