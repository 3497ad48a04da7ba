import pytest

from megatron_opd.errors import ConfigError
from megatron_opd.estimators import REGISTRY, build
from megatron_opd.estimators.forward_kl_topk import ForwardKLTopK
from megatron_opd.estimators.head_tail_reverse_kl import HeadTailReverseKL

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
    assert build("head_tail_reverse_kl", {"head": 4}) == HeadTailReverseKL(head=4, tail_draws=16)
    assert build("head_tail_reverse_kl", {"head": 4, "tail_draws": 9}).needs.tail_draws == 9


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
        ("zzz", {}, "known: forward_kl_topk, head_tail_reverse_kl, sampled_reverse_kl, sft"),
        ("forward_kl_topk", {"topk": 3}, "unknown setting estimator.settings.topk of forward_kl_topk; did you mean top_k?"),
        ("sft", {"x": 1}, "unknown setting estimator.settings.x of sft; known: none"),
        ("forward_kl_topk", {"top_k": "many"}, "estimator.settings.top_k of forward_kl_topk: Value 'many'"),
        ("forward_kl_topk", {"top_k": 2.5}, "estimator.settings.top_k of forward_kl_topk: Value '2.5'"),
        ("forward_kl_topk", {"top_k": None}, "estimator.settings.top_k of forward_kl_topk"),
        ("forward_kl_topk", {"top_k": 0}, "top_k=0 must be at least 1"),
        ("head_tail_reverse_kl", {"tail_draws": -1}, "tail_draws=-1 must be at least 1"),
        ("megatron_opd.types:Needs", {}, "must name a dataclass with `needs`"),
        ("megatron_opd.nowhere:X", {}, "cannot be imported"),
        ("megatron_opd.types:Nothing", {}, "has no 'Nothing'"),
    ],
)
def test_what_cannot_be_built_is_answered_with_the_nearest_right_thing(name, settings, message):
    with pytest.raises(ConfigError) as error:
        build(name, settings)
    assert message in str(error.value)
