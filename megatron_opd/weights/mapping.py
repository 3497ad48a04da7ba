"""Megatron-Core parameter names <-> Hugging Face names, for the families of `architectures`. It takes names and tensors, never modules.

`rules` is the table: one rule per Megatron parameter, in the order in which weights are sent. A rule names the parameter in
both worlds and holds a layout, which knows how Hugging Face tensors join to the full Megatron tensor and how tensor
parallelism cuts that. Layers and experts are counted over the whole model; which ranks hold them is not known here.

Dimension key: V vocabulary, D hidden, F feed-forward, h query heads, g key-value heads, d head size.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opd.types import TensorSpec
from megatron_opd.weights.architectures import Architecture, architecture


class Layout(Protocol):
    """How one parameter is composed, and how it is cut over tensor-parallel ranks."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors, in the rule's order, to the full Megatron tensor."""

    def part(self, full: Tensor) -> list[Tensor]:
        """The inverse of `join`."""

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """What one of `size` tensor-parallel ranks holds of the full tensor."""

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The inverse of `shard` over all ranks."""

    def blocks(self, size: int) -> tuple[int, int]:
        """Axis and number of the consecutive blocks of the full tensor, without padding, of which `size` ranks' shards are made."""


@dataclass(frozen=True, slots=True)
class _Replicated:
    """One tensor, the same on every rank."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def part(self, full: Tensor) -> list[Tensor]:
        return [full]

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]

    def blocks(self, size: int) -> tuple[int, int]:
        return 0, 1


@dataclass(frozen=True, slots=True)
class _Split(_Replicated):
    """One tensor, cut in equal pieces along one axis."""

    axis: int

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full.chunk(size, self.axis)[rank]

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(shards), self.axis)

    def blocks(self, size: int) -> tuple[int, int]:
        return self.axis, size


@dataclass(frozen=True, slots=True)
class _Vocabulary(_Replicated):
    """[V, D] cut along V; zero rows pad V to a multiple of the ranks, so all shards have one shape."""

    vocab: int

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        rows = -(-self.vocab // size)
        piece = full[rank * rows : (rank + 1) * rows]
        return piece if len(piece) == rows else torch.cat([piece, piece.new_zeros(rows - len(piece), full.shape[1])])

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(shards))[: self.vocab]

    def blocks(self, size: int) -> tuple[int, int]:
        return 0, size


@dataclass(frozen=True, slots=True)
class _QueryKeyValue(_Split):
    """Three tensors of h, g and g heads; Megatron interleaves them per group: h / g query heads, one key, one value."""

    groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.unflatten(0, (self.groups, -1)) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def part(self, full: Tensor) -> list[Tensor]:
        grouped = full.unflatten(0, (self.groups, -1))
        queries = grouped.shape[1] - 2 * self.head_dim
        return [piece.flatten(0, 1) for piece in grouped.split((queries, self.head_dim, self.head_dim), dim=1)]


@dataclass(frozen=True, slots=True)
class _GateUp:
    """Two tensors of F rows. The full tensor is gate over up; each rank holds its slice of gate over its slice of up."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(parts))

    def part(self, full: Tensor) -> list[Tensor]:
        return list(full.chunk(2))

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])

    def blocks(self, size: int) -> tuple[int, int]:
        return 0, 2 * size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    megatron: tuple[str, ...]  # its name in the local layer spec, then others that it may carry
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the Hugging Face tensors
    layout: Layout
    layer: int  # 0-based layer whose pipeline stage holds it; the embedding counts to the first, norm and head to the last
    expert: int | None = None  # 0-based number of the expert that it is part of; None: of what all tokens go through


def rules(arch: Architecture) -> tuple[Rule, ...]:
    """Every parameter of the model: embedding, layer by layer, final norm, head."""
    return tuple(_rules(arch))


def _rules(arch: Architecture) -> Iterator[Rule]:
    vocabulary, rows = _Vocabulary(arch.vocab), (arch.vocab, arch.hidden)
    head = "output_layer.weight"
    yield Rule(
        # The last pipeline stage of a tied model holds a copy of the embedding under the head's name.
        megatron=("embedding.word_embeddings.weight", head) if arch.tied else ("embedding.word_embeddings.weight",),
        hf=("model.embed_tokens.weight",),
        shapes=(rows,),
        layout=vocabulary,
        layer=0,
    )
    for layer in range(arch.layers):
        yield from _layer_rules(arch, layer)
    yield Rule(
        megatron=("decoder.final_layernorm.weight",),
        hf=("model.norm.weight",),
        shapes=((arch.hidden,),),
        layout=_Replicated(),
        layer=arch.layers - 1,
    )
    if not arch.tied:
        yield Rule(megatron=(head,), hf=("lm_head.weight",), shapes=(rows,), layout=vocabulary, layer=arch.layers - 1)


def _layer_rules(arch: Architecture, layer: int) -> Iterator[Rule]:
    """Names that Transformer Engine gives to norms fused into the linear layer behind them stand second."""
    query, key, hidden, ffn = arch.heads * arch.head_dim, arch.groups * arch.head_dim, arch.hidden, arch.ffn
    qkv = _QueryKeyValue(axis=0, groups=arch.groups, head_dim=arch.head_dim)

    def rule(
        megatron: tuple[str, ...], hf: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], layout: Layout, expert: int | None = None
    ) -> Rule:
        return Rule(
            megatron=tuple(f"decoder.layers.{layer}.{name}" for name in megatron),
            hf=tuple(f"model.layers.{layer}.{name}" for name in hf),
            shapes=shapes,
            layout=layout,
            layer=layer,
            expert=expert,
        )

    def projections(suffix: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{suffix}" for name in "qkv")

    yield rule(
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), ("input_layernorm.weight",), ((hidden,),), _Replicated()
    )
    yield rule(("self_attention.linear_qkv.weight",), projections("weight"), ((query, hidden), (key, hidden), (key, hidden)), qkv)
    if arch.qkv_bias:
        yield rule(("self_attention.linear_qkv.bias",), projections("bias"), ((query,), (key,), (key,)), qkv)
    if arch.qk_norm:
        for name in "qk":
            yield rule((f"self_attention.{name}_layernorm.weight",), (f"self_attn.{name}_norm.weight",), ((arch.head_dim,),), _Replicated())
    yield rule(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), ((hidden, query),), _Split(axis=1))
    if arch.linear_bias:
        yield rule(("self_attention.linear_proj.bias",), ("self_attn.o_proj.bias",), ((hidden,),), _Replicated())
    yield rule(
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), ("post_attention_layernorm.weight",), ((hidden,),), _Replicated()
    )
    if arch.experts is not None:
        block, (gate, up, down) = arch.experts.block, arch.experts.projections
        yield rule(("mlp.router.weight",), (f"{block}.gate.weight",), ((arch.experts.count, hidden),), _Replicated())
        for number in range(arch.experts.count):
            ours, theirs = f"mlp.experts.local_experts.{number}", f"{block}.experts.{number}"
            halves = (f"{theirs}.{gate}.weight", f"{theirs}.{up}.weight")
            yield rule((f"{ours}.linear_fc1.weight",), halves, ((ffn, hidden), (ffn, hidden)), _GateUp(), number)
            yield rule((f"{ours}.linear_fc2.weight",), (f"{theirs}.{down}.weight",), ((hidden, ffn),), _Split(axis=1), number)
        return
    yield rule(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ((ffn, hidden), (ffn, hidden)), _GateUp())
    if arch.linear_bias:
        yield rule(("mlp.linear_fc1.bias",), ("mlp.gate_proj.bias", "mlp.up_proj.bias"), ((ffn,), (ffn,)), _GateUp())
    yield rule(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), ((hidden, ffn),), _Split(axis=1))
    if arch.linear_bias:
        yield rule(("mlp.linear_fc2.bias",), ("mlp.down_proj.bias",), ((hidden,),), _Replicated())


def by_megatron_name(table: Sequence[Rule]) -> dict[str, Rule]:
    """The rule behind every name that a Megatron parameter may carry."""
    return {name: rule for rule in table for name in rule.megatron}


def to_megatron(get: Callable[[str], Tensor], rule: Rule, *, tensor_rank: int, tensor_size: int) -> Tensor:
    """One rank's shard of the rule's parameter; `get` answers a Hugging Face name with its tensor."""
    return rule.layout.shard(rule.layout.join([get(name) for name in rule.hf]), tensor_rank, tensor_size)


def to_hf(rule: Rule, shards: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """Hugging Face tensors from the shards of all tensor-parallel ranks."""
    return list(zip(rule.hf, rule.layout.part(rule.layout.merge(shards)), strict=True))


def hf_manifest(hf_config: Any, dtype: str) -> tuple[TensorSpec, ...]:
    """All Hugging Face tensors of the model in sending order; `dtype` is an attribute of torch, e.g. "bfloat16"."""
    return manifest(rules(architecture(hf_config)), dtype)


def manifest(table: Iterable[Rule], dtype: str) -> tuple[TensorSpec, ...]:
    """The Hugging Face tensors of some rules."""
    return tuple(
        TensorSpec(name=name, dtype=dtype, shape=shape) for rule in table for name, shape in zip(rule.hf, rule.shapes, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One full parameter and where a distributed checkpoint keeps it."""

    key: str
    shape: tuple[int, ...]  # without the axes along which layers, and experts in them, are stacked
    place: tuple[int, ...]  # index along each of those axes, which are the first; (): not stacked
    stack: tuple[int, ...]  # their lengths
    axis: int  # of `shape`: along it the parameter is cut into blocks
    blocks: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of all that the key holds."""
        return (*self.stack, *self.shape)


def stored(rule: Rule, arch: Architecture, *, tensor: int = 1) -> Parameter:
    """Where Megatron's distributed checkpoints keep the rule's full parameter: under the fused names, all layers of a kind stacked.

    It is cut into the blocks that `tensor` ranks read; any other number of ranks can read them too.
    """
    key, place, stack = rule.megatron[0], (), ()
    if in_layer := re.fullmatch(r"decoder\.layers\.\d+\.(.*)", rule.megatron[-1]):
        key, place, stack = f"decoder.layers.{in_layer[1]}", (rule.layer,), (arch.layers,)
    if in_expert := re.fullmatch(r"(decoder\.layers\.mlp\.experts)\.local_experts\.(\d+)\.(.*)", key):
        key, place, stack = f"{in_expert[1]}.experts.{in_expert[3]}", (*place, int(in_expert[2])), (*stack, arch.experts.count)
    axis, blocks = rule.layout.blocks(tensor)
    return Parameter(
        key=key,
        shape=tuple(rule.layout.join([torch.empty(shape, device="meta") for shape in rule.shapes]).shape),
        place=place,
        stack=stack,
        axis=axis,
        blocks=blocks,
    )


def extra_states(arch: Architecture) -> tuple[str, ...]:
    """Keys of the objects that Megatron's modules expect beside their parameters; all are None where nothing is in FP8."""
    modules = ["self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"]
    places = [f"{layer}" for layer in range(arch.layers)]
    states = [(f"{module}._extra_state", places, f"{arch.layers}") for module in modules]
    for module in ("linear_fc1", "linear_fc2"):
        if arch.experts is None:
            states.append((f"mlp.{module}._extra_state", places, f"{arch.layers}"))
        else:
            shards = [f"{layer}.{number}" for layer in places for number in range(arch.experts.count)]
            states.append((f"mlp.experts.experts.{module}._extra_state", shards, f"{arch.layers}.{arch.experts.count}"))
    return tuple(f"decoder.layers.{name}/shard_{shard}_{of}" for name, shards, of in states for shard in shards)
