"""Plans of the examples on a cluster: what fits, what is refused, and that the figures are where tools look for them."""

import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_opd import config as configs
from megatron_opd.errors import ConfigError
from megatron_opd.model.count import count_stages
from megatron_opd.model.parallel import ParallelConfig
from megatron_opd.placement import cluster_resources, place
from megatron_opd.plan.costs import costs_of, payload_bytes
from megatron_opd.plan.lengths import lengths_of
from megatron_opd.plan.memory import Model, memory_of, require_fit
from megatron_opd.plan.plan import make_plan, stage_seconds
from megatron_opd.preflight import build_estimator, check_configs, load_hf_config
from megatron_opd.slurm import script
from megatron_opd.types import Divergence, Needs
from tests.model import tiny

model_at = functools.cache(Model.load)  # what it has counted is not counted again
EXAMPLES = sorted(Path("examples/cluster").glob("*.yaml"))


def load(name, *overrides):
    return configs.load(Path("examples/cluster") / name, overrides)


def fit(config):
    needs = build_estimator(config).needs
    student, teacher = model_at(config.student.path), model_at(config.teacher.path)
    memory = memory_of(config, needs, student, teacher)
    require_fit(config, needs, student, teacher, memory)
    return memory


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_whole_fit_their_gpus_and_make_a_job(file):
    config = configs.load(file)
    check_configs(config)
    processes = place(config, cluster_resources(config), generation=True)
    assert len({process.node for process in processes}) == config.cluster.nodes
    assert "step learner 0 0" in script(config, processes)
    memory = fit(config)
    assert memory.keys() == {"learner", "rollout", "teacher"} | ({"hand_over"} if config.run.colocated else set())


def test_the_largest_example_is_counted_on_512_ranks():
    config = load("llama70b_from_405b.yaml", "learner.data_parallel=32", "cluster.nodes=88", "cluster.learner=[]")
    assert config.learner.world_size == 512
    model_at.cache_clear()  # counts do not tell replicas apart: this one is to be made on all 512
    memory = fit(config)["learner"]
    parameters = 70_553_706_496  # of Llama 3.1 70B, by its safetensors index
    assert memory["weights"] / 2 * 16 == pytest.approx(parameters, rel=0.01)
    assert memory["optimizer"] == pytest.approx(memory["weights"] / 2 * 12 / 32)


def test_the_stages_of_a_split_add_up_to_the_model():
    hf_config = load_hf_config("examples/cluster/models/llama-3.1-8b")
    (whole,) = count_stages(hf_config, ParallelConfig())
    assert whole.parameters == 8_030_261_248
    stages = count_stages(hf_config, ParallelConfig(tensor=4, pipeline=4, data=8))
    norms = 4096 * (2 * 32 + 1)  # on every tensor rank
    assert sum(4 * stage.parameters for stage in stages) == whole.parameters + 3 * norms
    assert [stage.layers for stage in stages] == [8, 8, 8, 8]
    assert [stage.layers for stage in count_stages(hf_config, ParallelConfig(pipeline=3))] == [11, 11, 10]
    assert [stage.layers for stage in count_stages(hf_config, ParallelConfig(pipeline=3, layers=(12, 12, 8)))] == [12, 12, 8]


def test_ranks_that_share_experts_hold_their_part_of_them():
    hf_config = tiny.config("qwen3_moe")
    (whole,) = count_stages(hf_config, ParallelConfig())
    (third,) = count_stages(hf_config, ParallelConfig(data=6, expert=3))
    experts = 4 * 6 * 3 * 48 * 40  # layers, experts, matrices of each
    assert whole.expert_parameters == 0 and third.expert_parameters == experts // 3
    assert whole.parameters - third.parameters == experts * 2 // 3


def test_of_the_experts_a_token_meets_a_few(tmp_path):
    config = json.loads(Path("examples/cluster/models/qwen3-235b-a22b/config.json").read_text())
    sizes = []
    for layers in (1, 2):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        model = Model.load(str(tmp_path))
        sizes.append((model.parameters, model.active_parameters))
    whole = [round((one + (config["num_hidden_layers"] - 1) * (two - one)) / 1e9) for one, two in zip(*sizes)]
    assert whole == [235, 22], "as the model's name says"
    dense = model_at("examples/cluster/models/llama-3.1-8b")
    assert dense.active_parameters == dense.parameters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.tensor_parallel=4"], r"learner needs .* most of it is optimizer .*nearest settings that fit: learner\."),
        (["rollout.kv_cache_bytes=200000000000"], r"rollout needs .* most of it is kv_cache .*fit: rollout\.kv_cache_bytes=\d+"),
        (
            ["teacher.tensor_parallel=1", "teacher.path=examples/cluster/models/llama-3.1-70b"],
            r"teacher needs .* most of it is weights .*fit: teacher\.tensor_parallel=2",
        ),
        (
            ["rollout.kv_cache_bytes=100000000"],
            r"rollout\.kv_cache_bytes=100000000 on 2 ranks cannot hold one sequence .* wanted at least 671088640",
        ),
        (["cluster.gpu=h10"], r"cluster\.gpu=h10 is not in the table; use one of a100"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(overrides, message):
    with pytest.raises(ConfigError, match=message):
        fit(load("qwen32b_from_235b_moe.yaml", *overrides))


def command(*words):
    """A command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "megatron_opd", *map(str, words)], capture_output=True, text=True, timeout=120)


@pytest.mark.engines
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_launched_up_to_sbatch(file):
    ended = command("launch", "slurm", file, "--dry-run", "--configs-only")
    assert ended.returncode == 0 and "#SBATCH --nodes=" in ended.stdout and "step learner 0 0" in ended.stdout, ended


@pytest.mark.engines
def test_a_plan_of_70b_on_512_ranks_takes_a_minute_and_little_memory(tmp_path):
    start = time.monotonic()
    overrides = ["learner.data_parallel=32", "cluster.nodes=88", *(f"cluster.{role}=[]" for role in ("learner", "rollout", "teacher"))]
    ended = command("plan", "examples/cluster/llama70b_from_405b.yaml", *overrides, "--json", tmp_path / "plan.json")
    assert ended.returncode == 0 and time.monotonic() - start < 60, ended
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest of all that this process has waited for
    assert peak < 8e9
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and sum(found["roles"]["learner"]["memory_bytes"].values()) < 80e9


@pytest.mark.engines
def test_a_plan_that_does_not_fit_says_so_in_its_json_too(tmp_path):
    ended = command(
        "plan", "examples/cluster/qwen32b_from_235b_moe.yaml", "rollout.kv_cache_bytes=200000000000", "--json", tmp_path / "plan.json"
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is False and found["reason"] in ended.stdout + ended.stderr and "nearest settings" in found["reason"]


def test_roles_that_share_a_gpu_are_counted_in_every_turn():
    memory = fit(load("llama8b_one_node.yaml"))
    assert memory["rollout"]["learner_weights"] == memory["learner"]["weights"]
    assert memory["hand_over"]["sync"] == 2 * 8_030_261_248, "the first rank holds the whole model while it is handed over"
    with pytest.raises(ConfigError, match=r"hand_over needs .* most of it is .*nearest settings that fit: learner\."):
        fit(load("llama8b_one_node.yaml", "learner.tensor_parallel=2", "rollout.tensor_parallel=2", "rollout.kv_cache_bytes=1000000000"))


def test_more_speed_where_there_is_more_of_everything():
    config = load("llama8b_one_node.yaml")
    student, teacher = model_at(config.student.path), model_at(config.teacher.path)

    def seconds(*overrides):
        made = load("llama8b_one_node.yaml", *overrides)
        return stage_seconds(made, costs_of(made, student, teacher), lengths_of(made))

    base = seconds()
    apart = ["run.colocated=false"]
    assert seconds(*apart, "rollout.replicas=2")["rollout"] == pytest.approx(base["rollout"] / 2)
    assert seconds("teacher.tensor_parallel=8")["teacher"] == pytest.approx(base["teacher"] / 2)
    assert seconds("cluster.gpu=a100")["learner"] > 2.5 * base["learner"]
    assert seconds("learner.recompute=false")["learner"] < base["learner"]


def test_the_payload_is_what_the_scores_weigh():
    teacher = Model.load("examples/cluster/models/llama-3.1-8b")
    assert payload_bytes(Needs(teacher_top=64), teacher) == 512
    assert (
        payload_bytes(Needs(head=16, teacher_head=True, head_rest=True, draws=16, teacher_draws=True, teacher_token=True), teacher) == 136
    )
    assert payload_bytes(Needs(divergence=Divergence(kind="reverse")), teacher) == 8192


def test_a_plan_has_its_figures_under_the_names_that_tools_read():
    config = load("llama8b_one_node.yaml", "loop.batch=16", "loop.max_lag=1", "plan.steps=3", "plan.response_tokens=100")
    found = json.loads(json.dumps(make_plan(config).to_json()))
    assert found["fits"] is True and found["bottleneck"] in ("learner", "rollout", "teacher")
    assert found["step_seconds"].keys() == {"0", "1", "2", "4"} and found["step_seconds"]["4"] < found["step_seconds"]["0"]
    assert found["roles"]["learner"]["memory_bytes"]["weights"] > 1e9


def test_a_cpu_has_no_speeds_without_a_run():
    config = configs.load("examples/arithmetic/config.yaml")
    with pytest.raises(ConfigError, match=r"set plan\.calibration to the directory of a finished run"):
        costs_of(config, None, None)
