import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatron_opd import config
from megatron_opd.errors import ConfigError

BASE = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}}


def resolve(**sections):
    return config.resolve(OmegaConf.merge(BASE, sections))


def test_yaml_gives_back_the_same_config():
    made = resolve(learner={"cores": [0, 1], "optimizer": {"lr": 3e-4}}, estimator={"settings": {"top_k": 4}})
    assert config.resolve(OmegaConf.create(config.to_yaml(made))) == made
    assert made.learner.cores == (0, 1) and made.learner.optimizer.lr == 3e-4


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().loop.steps = 3


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loop": {"max_lga": 1}}, r"unknown setting loop\.max_lga; did you mean loop\.max_lag\?"),
        ({"max_lag": 1}, r"unknown setting max_lag; did you mean loop\.max_lag\?"),
        ({"lr": 1}, r"unknown setting lr; did you mean learner\.optimizer\.lr\?"),
        ({"estimator": {"top_k": 1}}, r"unknown setting estimator\.top_k; did you mean estimator\.settings\.top_k\?"),
        ({"lop": {"steps": 1}}, r"unknown setting lop; did you mean loop\?"),
        ({"learner": {"optimizer": {"learning": 1}}}, r"unknown setting learner\.optimizer\.learning"),
        ({"loop": {"steps": "many"}}, r"loop\.steps: .*many"),
        ({"loop": {"steps": 0}}, r"loop\.steps=0 must be greater than 0"),
        ({"loop": {"max_lag": -1}}, r"loop\.max_lag=-1"),
        ({"loop": 3}, "loop is a section of settings, got 3"),
        ({"rollout": {"top_p": 0}}, r"rollout\.top_p=0\.0 must lie in \(0, 1\]"),
        ({"teacher": {"path": ""}}, r"teacher\.path is missing"),
        ({"learner": {"fp8": {"logits": "fp8"}}}, r"learner\.fp8\.logits=fp8 is what learner\.kernels=te does, not auto"),
        ({"learner": {"fp8": {"body": True}}}, r"learner\.fp8\.body=true wants learner\.dtype=bfloat16, not float32"),
        ({"learner": {"fp8": {"body": True}, "dtype": "bfloat16"}}, r"learner\.fp8\.body=true needs TransformerEngine's layers"),
        ({"learner": {"fp8": {"noise_every": -1}}}, r"learner\.fp8\.noise_every=-1"),
        ({"teacher": {"backend": "vllm", "pipeline_parallel": 2}}, "needs teacher.backend=megatron"),
        ({"learner": {"sequence_parallel": True}}, "learner.tensor_parallel > 1"),
        ({"learner": {"expert_parallel": 2, "data_parallel": 3}}, r"expert_parallel=2 does not divide learner\.data_parallel=3"),
        ({"eval": {"verifier": "a.py:f"}}, r"eval\.prompts is empty"),
        ({"learner": {"optimizer": {"warmup_steps": -1}}}, "warmup_steps=-1 must be 0 or more"),
        ({"learner": {"optimizer": {"beta2": 1.0}}}, r"beta2=1.0 must lie in \[0, 1\)"),
        ({"run": {"port": 65536}}, r"run\.port=65536 must lie in 0\.\.65535"),
        ({"eval": {"limit": -5}}, "eval.limit=-5 must be 0 or more"),
        ({"eval": {"models": ["after", "befor"]}}, r"eval\.models=\['after', 'befor'\] must name some of before, after, teacher"),
        ({"guard": {"length_growth": -1}}, "length_growth=-1.0 must be 0 or more than 1"),
        ({"cluster": {"nodes": 2, "rollout": [2]}}, r"cluster\.rollout names node \[2\], but cluster\.nodes=2"),
        ({"slurm": {"time": "tomorrow"}}, r"slurm\.time=tomorrow is no time limit; write e\.g\. 24:00:00"),
        ({"slurm": {"container_mounts": "/a:/b"}}, r"container_mounts needs slurm\.container_image"),
        ({"slurm": {"options": ["partition=gpu"]}}, "'partition=gpu' is not of the form --name=value"),
        ({"guard": {"support_mass": 5}}, r"support_mass=5.0 must lie in \[0, 1\)"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(sections, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**sections)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match=r"no value for data\.prompts, student\.path"):
        config.resolve(OmegaConf.create({"teacher": {"path": "t"}}))


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("student: {path: s}\nteacher: {path: t}\ndata: {prompts: p}\nloop: {steps: 5}\n")
    assert config.load(file, ["loop.steps=7", "learner.cores=[1]"]).loop.steps == 7
    assert config.load(file, ["eval.prompts=", "eval.verifier="]).eval.prompts == ""
    with pytest.raises(ConfigError, match="is not of the form key=value"):
        config.load(file, ["loop.steps"])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00"])
def test_an_unreadable_file_is_a_config_error(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        config.load(file)
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(tmp_path / "absent.yaml")


NAMES = [section.name for section in dataclasses.fields(config.Config)]
SETTINGS = sorted({f.name for section in dataclasses.fields(config.Config) for f in dataclasses.fields(section.default_factory)})
VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.lists(st.integers(0, 2), max_size=2)


def is_understood(file):
    try:
        assert isinstance(config.load(file), config.Config)
    except ConfigError as error:
        assert str(error)


@given(data=st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_config_or_a_config_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(data)
    is_understood(file)


@given(sections=st.dictionaries(st.sampled_from([*NAMES, "lop"]), st.dictionaries(st.sampled_from(SETTINGS), VALUES, max_size=3) | VALUES))
@settings(max_examples=150, deadline=None)
def test_any_values_of_settings_are_a_config_or_a_config_error(tmp_path_factory, sections):
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(yaml.safe_dump(BASE | sections))
    is_understood(file)


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"colocated": True}},
        {"cluster": {"nodes": 2}},
        {"checkpoint": {"journal": "off"}},
        {"loop": {"exact_lag": True}},
        {"supervision": {"restarts": 0}},
    ],
)
def test_a_learner_is_replaced_only_where_it_ends_alone_and_what_it_did_is_kept(sections):
    assert resolve().replaces_learner and not resolve(**sections).replaces_learner
