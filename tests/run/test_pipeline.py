"""The whole system through its command line: real vLLM, real Megatron-Core, real wires."""

import json

import pytest
import torch

from megatron_opd import config as configs
from tests.model.tiny import read_model
from tests.run import tiny_run
from tests.run.everything import TOLERANCE, Everything

pytestmark = pytest.mark.engines

TP2, TIED = {"tensor_parallel": 2}, {"tie_word_embeddings": True}
# name: (family, model settings, learner layout, teacher layout, tensor-parallel size of the rollouts, group of estimators)
CASES = {
    "untied llama, tp2 sp": ("llama", {}, {**TP2, "sequence_parallel": True}, {}, 1, "head"),
    "tied llama, uneven pp2, teacher tp2": ("llama", {**TIED, "num_hidden_layers": 3}, {"pipeline_parallel": 2}, TP2, 1, "draws"),
    "tied qwen2, tp2, changes alone sent, teacher pp2": ("qwen2", TIED, {**TP2, "weight_delta": True}, {"pipeline_parallel": 2}, 1, "head"),
    "untied qwen3, dp2, vllm tp2": ("qwen3", {}, {"data_parallel": 2}, {}, 2, "draws"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_student_that_is_its_own_teacher_has_no_gradient_and_engines_agree_after_updates(case, tmp_path):
    """For every estimator. A shift by one in tokens, masks, scores or weights makes one of the two fail by orders of magnitude."""
    family, model, learner, teacher, width, group = case
    tiny = tiny_run.make(tmp_path, family, **model)
    pieces = {"draws": 7}.get(group, 0)  # of 24 tokens
    sections = {"learner": learner, "teacher": teacher, "rollout": {"tensor_parallel": width, "piece_tokens": pieces}}
    sections["estimator"] = {"name": "tests.run.everything:Everything", "settings": {"group": group}}
    tiny_run.train(tiny.config("other", **sections), "loop.steps=3")
    tiny_run.train(tiny.config("same", **sections), f"teacher.path={tiny.student}")
    other, same = tiny.steps("other"), tiny.steps("same")
    assert same[0]["grad_norm"] <= 1e-4 * other[0]["grad_norm"] and other[0]["tokens"] > 50
    for name in Everything(group=group).parts:
        assert abs(same[0]["diagnostics"][name]) <= 2e-5 < 1e-2 < abs(other[0]["diagnostics"][name]), name
    seen = same[0]["diagnostics"]
    assert seen["agreement"] == 1.0 and seen["student_entropy"] == pytest.approx(seen["teacher_entropy"], rel=1e-5)
    assert same[0]["diagnostics"]["apart_from_teacher"] == 0 and other[0]["diagnostics"]["apart_from_teacher"] > 0.9
    for step in other:
        assert step["lags"] == {"0": step["tokens"]}
        assert step["diagnostics"]["apart_from_behaviour"] == 0, f"step {step['version']}: vLLM is off by more than {TOLERANCE}"
        assert step["diagnostics"]["mismatch"] < 1e-4, f"step {step['version']}: vLLM and learner disagree about the same tokens"


def test_an_asynchronous_run_with_replicas_keeps_its_bound_and_leaves_everything_behind(tmp_path):
    tiny = tiny_run.make(tmp_path)
    file = tiny.config(
        "run",
        rollout={"replicas": 2, "max_response_tokens": 64, "dtype": "bfloat16"},
        teacher={"backend": "vllm", "kv_cache_bytes": 8 << 20},
        learner={"dtype": "bfloat16", "recompute": True},
        loop={"steps": 8, "batch": 6, "max_lag": 2},
        eval={"prompts": str(tmp_path / "prompts.jsonl"), "limit": 10, "verifier": f"{__file__}:has_words"},
    )
    output = tiny_run.train(file)
    run, steps = tmp_path / "run", tiny.steps("run")
    assert [step["version"] for step in steps] == list(range(1, 9))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["observed_lag_max"] == max(int(lag) for step in steps for lag in step["lags"]) <= 2
    assert summary["observed_lag_max"] > 0, "eight steps of an asynchronous run without any lag"
    assert summary["tokens"] == sum(step["tokens"] for step in steps) == sum(summary["lag_histogram"].values())
    assert {"accuracy_before", "accuracy_after", "teacher_accuracy", "kl_before", "kl_after"} <= summary.keys()
    assert summary["accuracy_after"] == 1.0 and summary["kl_before"] > 0.1
    assert summary["kl_after"] < summary["kl_before"]
    assert configs.load(run / "config.yaml").loop.max_lag == 2
    assert list((run / "tensorboard").glob("events*"))
    assert "run summary" in output and "step 8" in output
    before, after = read_model(tiny.student).state_dict(), read_model(summary["hf_export"]).state_dict()
    assert all(before[name].shape == after[name].shape for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def has_words(record, completion):
    """A verifier: the record is the line as it stands, the completion is text."""
    return float(isinstance(record["prompt"], str) and completion.startswith("w"))


def supervised(folder, steps, **sections):
    """A tiny model and completions for its prompts; and the config of a run on them."""
    tiny = tiny_run.make(folder)
    lines = [json.dumps({"prompt": f"w{i:03}", "completion": f"w{i + 1:03} w{i + 2:03}"}) for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return tiny, tiny.config("run", teacher={"backend": "none", "path": ""}, estimator={"name": "sft"}, loop={"steps": steps}, **sections)


def test_a_run_saves_and_ends_before_its_time_limit(tmp_path):
    tiny, file = supervised(tmp_path, 100_000, checkpoint={"time_limit_s": 21, "before_limit_s": 1})
    process = tiny_run.start(file)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "before its time limit; go on with: megatron-opd train" in output.splitlines()[-1]
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == f"step-{len(tiny.steps('run')):08}"


def test_supervised_training_needs_neither_teacher_nor_vllm(tmp_path):
    tiny, file = supervised(tmp_path, 12)
    tiny_run.train(file, "learner.optimizer.lr=0.01")
    steps = tiny.steps("run")
    assert all(step["tokens"] == 8 * 3 for step in steps), "two words and the end of each completion count"
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert not list((tmp_path / "run" / "logs").glob("rollout*"))


def test_a_dry_run_prints_config_and_roles_and_starts_nothing(tmp_path):
    tiny = tiny_run.make(tmp_path)
    output = tiny_run.train(tiny.config("run", learner={"tensor_parallel": 2}), "--dry-run", "loop.max_lag=3")
    assert "max_lag: 3" in output and "learner-1" in output and "rollout-0" in output
    assert not (tmp_path / "run").exists()
