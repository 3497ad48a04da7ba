"""Learner and rollout in the same processes, in turns: the same system to the controller, and to the student."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.run import tiny_run
from tests.run.everything import TOLERANCE, Everything

pytestmark = pytest.mark.engines


@pytest.mark.parametrize(("family", "ranks"), [("tied qwen3", 1), ("untied llama", 2)])
def test_a_student_that_is_its_own_teacher_has_no_gradient_and_the_engine_has_the_new_weights(family, ranks, tmp_path):
    tied, name = family.split()
    tiny = tiny_run.make(tmp_path, name, tie_word_embeddings=tied == "tied")
    sections = {"run": {"colocated": True}, "learner": {"tensor_parallel": ranks}, "rollout": {"tensor_parallel": ranks}}
    sections["estimator"] = {"name": "tests.run.everything:Everything", "settings": {"group": "draws"}}
    tiny_run.train(tiny.config("other", **sections), "loop.steps=3")
    tiny_run.train(tiny.config("same", **sections), f"teacher.path={tiny.student}")
    other, same = tiny.steps("other"), tiny.steps("same")
    assert same[0]["grad_norm"] <= 1e-4 * other[0]["grad_norm"] and other[0]["tokens"] > 50
    for part in Everything(group="draws").parts:
        assert abs(same[0]["diagnostics"][part]) <= 2e-5 < 1e-2 < abs(other[0]["diagnostics"][part]), part
    for step in other:
        assert step["lags"] == {"0": step["tokens"]}
        assert step["diagnostics"]["apart_from_behaviour"] == 0, f"step {step['version']}: vLLM is off by more than {TOLERANCE}"
        assert step["diagnostics"]["mismatch"] < 1e-4, f"step {step['version']}: vLLM and learner disagree about the same tokens"
    assert not list((tmp_path / "other" / "logs").glob("rollout*"))


def test_the_trained_weights_are_those_of_roles_apart(tmp_path):
    """Prompts are sampled alike wherever they are sampled; batches of another shape round otherwise, so equal to 1e-5."""
    tiny = tiny_run.make(tmp_path)
    trained = []
    for name, colocated in (("together", True), ("apart", False)):
        tiny_run.train(tiny.config(name, run={"colocated": colocated}, estimator={"name": "head_tail_reverse_kl"}), "loop.steps=4")
        trained.append(load_file(tmp_path / name / "hf" / "model.safetensors"))
    together, apart = trained
    before = load_file(Path(tiny.student) / "model.safetensors")
    assert any((apart[name] - before[name]).abs().max() > 1e-3 for name in apart), "four steps at 1e-3 move weights by more"
    for name in apart:
        torch.testing.assert_close(together[name], apart[name], atol=1e-5, rtol=0)


def test_an_asynchronous_run_keeps_its_bound_in_turns_too(tmp_path):
    tiny = tiny_run.make(tmp_path)
    tiny_run.train(tiny.config("run", run={"colocated": True}, loop={"steps": 6, "batch": 6, "max_lag": 2}))
    lags = [int(lag) for step in tiny.steps("run") for lag in step["lags"]]
    assert 0 < max(lags) <= 2
