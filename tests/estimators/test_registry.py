from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opd.errors import ConfigError
from megatron_opd.estimators import REGISTRY, build
from megatron_opd.estimators.forward_kl_topk import ForwardKLTopK
from megatron_opd.estimators.head_tail_reverse_kl import HeadTailReverseKL
from megatron_opd.estimators.mix import Mix
from tests.estimators.cases import logits, scores_for

OWN = """
from dataclasses import dataclass
from megatron_opd.types import Estimate, Needs

@dataclass(frozen=True, kw_only=True)
class Mine:
    weight: float = 1.0

    @property
    def needs(self):
        return Needs(behaviour_logp=True)

    def __call__(self, scores):
        return Estimate(loss=-self.weight * scores.token.student_logp[:, 0])
"""


def test_settings_reach_the_fields():
    assert build("forward_kl_topk", {"top_k": 7}) == ForwardKLTopK(top_k=7)
    assert build("head_tail_reverse_kl", {"head": 4}) == HeadTailReverseKL(head=4, draws=16)
    assert build("head_tail_reverse_kl", {"head": 4, "draws": 9}).needs.draws == 9


def test_every_registered_estimator_builds_with_its_defaults_and_is_frozen():
    for name, kind in REGISTRY.items():
        estimator = build(name, {})
        assert type(estimator) is kind and hash(estimator) == hash(build(name, {}))


def test_an_estimator_of_ones_own_is_named_by_module_or_by_file(tmp_path):
    assert build("megatron_opd.estimators.forward_kl_topk:ForwardKLTopK", {"top_k": 2}) == ForwardKLTopK(top_k=2)
    (tmp_path / "own.py").write_text(OWN)
    mine = build(f"{tmp_path}/own.py:Mine", {"weight": 2})
    assert mine.weight == 2.0 and mine.needs.behaviour_logp


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("forward_kl_top_k", {}, "unknown estimator.name=forward_kl_top_k; did you mean forward_kl_topk?"),
        (
            "zzz",
            {},
            "known: " + ", ".join(REGISTRY),
        ),
        ("forward_kl_topk", {"topk": 3}, "unknown setting estimator.settings.topk of forward_kl_topk; did you mean top_k?"),
        ("sft", {"x": 1}, "unknown setting estimator.settings.x of sft; known: none"),
        ("forward_kl_topk", {"top_k": "many"}, "estimator.settings.top_k of forward_kl_topk: Value 'many'"),
        ("forward_kl_topk", {"top_k": 2.5}, "estimator.settings.top_k of forward_kl_topk: Value '2.5'"),
        ("forward_kl_topk", {"top_k": None}, "estimator.settings.top_k of forward_kl_topk"),
        ("forward_kl_topk", {"top_k": 0}, "top_k=0 must be at least 1"),
        ("head_tail_reverse_kl", {"draws": -1}, "draws=-1 must be at least 1"),
        ("sampled_reverse_kl", {"correction": "clip"}, "estimator.settings.correction of sampled_reverse_kl"),
        ("sampled_reverse_kl", {"draws": -1}, "draws=-1 must be 0 or more"),
        ("sampled_reverse_kl", {"cap": 0}, "cap=0.0 must be greater than 0"),
        ("reverse_kl_topk", {"head": 0}, "head=0 must be at least 1"),
        ("dense_kl", {"divergence": "jsd", "weight": 1}, "weight=1.0 must lie in [0, 1], and inside it for jsd"),
        ("megatron_opd.types:Needs", {}, "must name a dataclass with `needs`"),
        ("megatron_opd.nowhere:X", {}, "cannot be imported"),
        ("megatron_opd.types:Nothing", {}, "has no 'Nothing'"),
    ],
)
def test_what_cannot_be_built_is_answered_with_the_nearest_right_thing(name, settings, message):
    with pytest.raises(ConfigError) as error:
        build(name, settings)
    assert message in str(error.value)


def test_mixed_estimators_must_agree_on_what_is_cached():
    parts = {"first": build("head_tail_reverse_kl", {}), "second": build("forward_kl_topk", {"top_k": 8})}
    assert Mix(**parts).needs == replace(parts["first"].needs, teacher_top=8, top_rest=True)
    for second, message in {
        ("head_tail_reverse_kl", "head"): "head=16 and head=4",
        ("sampled_reverse_kl", "draws"): "draws=16 and draws=4",
    }.items():
        with pytest.raises(ConfigError, match=message):
            Mix(first=parts["first"], second=build(second[0], {second[1]: 4}))
    for headed in ("head_tail_reverse_kl", "reverse_kl_topk"):
        with pytest.raises(ConfigError, match="draws from all of b"):
            Mix(first=build("sampled_reverse_kl", {"draws": 16}), second=build(headed, {}))
    with pytest.raises(ConfigError, match="given completions"):
        Mix(first=parts["first"], second=build("sft", {}))


def test_the_estimator_that_the_documentation_shows_works_as_it_stands(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "examples" / "OBJECTIVES.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    (tmp_path / "alpha.py").write_text(blocks[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[1] + "\ntest_no_loss_where_student_and_teacher_agree()", "OBJECTIVES.md", "exec"), {})
    with pytest.raises(ConfigError, match=r"alpha=1\.0 must lie between 0 and 1"):
        build("alpha.py:AlphaDivergence", {"alpha": 1.0})
    estimator = build(f"{tmp_path}/alpha.py:AlphaDivergence", {"top_k": 3})
    p, q = logits(6, 9, 1).requires_grad_(), logits(6, 9, 2)
    assert (estimator(scores_for(estimator.needs, p, q, q)).loss > 0.01).all()
    (grad,) = torch.autograd.grad(estimator(scores_for(estimator.needs, p, p.detach(), q)).loss.sum(), p)
    assert grad.abs().max() < 1e-12
