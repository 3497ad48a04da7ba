"""Every family, with sizes as awkward as they come: through a distributed checkpoint and back, byte for byte."""

import os
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opd.errors import CheckpointError
from megatron_opd.weights.architectures import FAMILIES, architecture
from megatron_opd.weights.checkpoint import DistributedCheckpoint, write_checkpoint
from megatron_opd.weights.files import write_shard
from megatron_opd.weights.mapping import extra_states, hf_manifest, rules, stored, to_hf, to_megatron
from tests.model import tiny

pytestmark = pytest.mark.engines


def awkward(family, seed):
    """A random config that 2 ranks can share, and weights for it."""
    chance = random.Random(seed)
    groups, ratio = 2 * chance.randint(1, 2), chance.randint(1, 3)
    bias = chance.random() < 0.5
    biases = {"llama": {"attention_bias": bias, "mlp_bias": bias}}.get(family, {})
    config = tiny.config(
        family,
        vocab_size=chance.choice([5, 61, 97, 128]),
        num_hidden_layers=chance.randint(1, 5),
        num_key_value_heads=groups,
        num_attention_heads=groups * ratio,
        hidden_size=groups * ratio * 2 * chance.randint(1, 3),
        head_dim=2 * chance.randint(1, 5),
        intermediate_size=2 * chance.randint(1, 19),
        tie_word_embeddings=chance.random() < 0.5,
        **biases,
    )
    generator = torch.Generator().manual_seed(seed)
    return config, {spec.name: torch.randn(spec.shape, generator=generator) for spec in hf_manifest(config, "float32")}


def written(folder, config, weights, tensor, file_bytes=4 << 30):
    arch = architecture(config)
    rule_of = {stored(rule, arch, tensor=tensor): rule for rule in rules(arch)}
    folder.mkdir(exist_ok=True)

    def get(parameter):
        return rule_of[parameter].layout.join([weights[name] for name in rule_of[parameter].hf])

    write_checkpoint(folder, list(rule_of), get, dtype="float32", objects=extra_states(arch), file_bytes=file_bytes)
    return rule_of


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_reads_what_any_number_wrote(family, seed, tmp_path):
    config, weights = awkward(family, seed)
    rule_of = written(tmp_path, config, weights, tensor=1 + seed % 2, file_bytes=(1, 3000, 4 << 30)[seed % 3])
    checkpoint = DistributedCheckpoint(tmp_path)
    checkpoint.check(list(rule_of))
    back = {}
    for parameter, rule in rule_of.items():
        full = checkpoint.get(parameter)
        back.update(zip(rule.hf, rule.layout.part(full), strict=True))
        for size in (1, 2):
            shards = [to_megatron(weights.__getitem__, rule, tensor_rank=rank, tensor_size=size) for rank in range(size)]
            assert torch.equal(rule.layout.merge(shards), full)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in to_hf(rule, shards))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_what_is_missing_unknown_or_half_there_is_named(tmp_path):
    config, weights = awkward("qwen3", 1)
    rule_of = written(tmp_path, config, weights, tensor=2)
    checkpoint, parameters = DistributedCheckpoint(tmp_path), list(rule_of)
    with pytest.raises(CheckpointError, match="unknown to the model"):
        checkpoint.check(parameters[1:])
    held = checkpoint._metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    held.chunks.pop(0)
    broken = next(parameter for parameter in parameters if parameter.key == "decoder.layers.mlp.linear_fc2.weight")
    with pytest.raises(CheckpointError, match=r"the stored blocks of decoder\.layers\.mlp\.linear_fc2\.weight do not make up"):
        checkpoint.get(broken)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp does not exist"):
        DistributedCheckpoint(tmp_path)


def test_the_optimizer_in_a_training_checkpoint_is_passed_over(tmp_path):
    config, weights = awkward("llama", 2)
    rule_of = written(tmp_path, config, weights, tensor=1)
    checkpoint = DistributedCheckpoint(tmp_path)
    checkpoint._tensors["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = checkpoint._tensors["decoder.final_layernorm.weight"]
    checkpoint.check(list(rule_of))


def test_the_safetensors_writer_writes_what_the_library_reads(tmp_path):
    config, weights = awkward("mistral", 3)
    manifest = hf_manifest(config, "float32")
    write_shard(tmp_path / "ours", manifest, iter([(spec.name, weights[spec.name]) for spec in manifest]))
    save_file(weights, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


class Evil:
    """Unpickled by anybody, it runs a command."""

    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_that_asks_for_anything_but_an_index_is_refused(tmp_path):
    config, weights = awkward("llama", 0)
    written(tmp_path, config, weights, tensor=1)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        DistributedCheckpoint(tmp_path)
