"""Distillation objectives: pure functions from the scores of each token to a loss per token.

They know nothing of tensor parallelism, packing or reductions. A new one is a file with a frozen dataclass whose fields are
its settings, and a line in `REGISTRY`; `tests/estimators/test_contract.py` then holds it to the laws by itself.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_opd.errors import ConfigError
from megatron_opd.estimators.dense_kl import DenseKL
from megatron_opd.estimators.forward_kl_topk import ForwardKLTopK
from megatron_opd.estimators.forward_kl_truncated import ForwardKLTruncated
from megatron_opd.estimators.head_tail_reverse_kl import HeadTailReverseKL
from megatron_opd.estimators.reverse_kl_topk import ReverseKLTopK
from megatron_opd.estimators.sampled_reverse_kl import SampledReverseKL
from megatron_opd.estimators.sft import SFT
from megatron_opd.interfaces import Estimator
from megatron_opd.runtime.imports import load_object

REGISTRY: dict[str, type] = {
    "dense_kl": DenseKL,
    "forward_kl_topk": ForwardKLTopK,
    "forward_kl_truncated": ForwardKLTruncated,
    "head_tail_reverse_kl": HeadTailReverseKL,
    "reverse_kl_topk": ReverseKLTopK,
    "sampled_reverse_kl": SampledReverseKL,
    "sft": SFT,
}


def build(name: str, settings: Mapping[str, Any]) -> Estimator:
    """The estimator called `name` in the registry, or named as `package.module:Class` or `file.py:Class`, with its settings.

    Raises:
        ConfigError: unknown name or setting, with the nearest right one; a value of the wrong type; a failed check.
    """
    kind = load_object(name, "estimator.name") if ":" in name else REGISTRY.get(name)
    if kind is None:
        raise ConfigError(f"unknown estimator.name={name}; {_nearest(name, REGISTRY)} (your own: package.module:Class or file.py:Class)")
    if not (isinstance(kind, type) and is_dataclass(kind) and "needs" in dir(kind)):
        raise ConfigError(f"estimator.name={name} must name a dataclass with `needs` and `__call__`, like those of megatron_opd/estimators")
    known = [field.name for field in fields(kind)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"unknown setting estimator.settings.{key} of {name}; {_nearest(str(key), known)}")
    try:
        return cast(Estimator, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(settings))))
    except OmegaConfBaseException as error:
        place = getattr(error, "full_key", None)
        raise ConfigError(f"estimator.settings{f'.{place}' if place else ''} of {name}: {str(error).splitlines()[0]}") from error


def _nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
