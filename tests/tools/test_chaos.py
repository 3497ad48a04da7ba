"""tools/chaos.py on tiny models: runs that are broken on purpose come out whole, and the audit sees one that would not."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from megatron_opd.estimators import build
from tests.run import tiny_run
from tools.chaos import Findings, Setup, audit, chaos

STEPS, BATCH = 40, 4


@dataclass(frozen=True, kw_only=True)
class Given:
    """Distillation on given completions: a run without an engine, whose start takes a third of the time."""

    @property
    def needs(self):
        return replace(build("forward_kl_topk", {"top_k": 4}).needs, generation=False)

    def __call__(self, scores):
        return build("forward_kl_topk", {"top_k": 4})(scores)


@pytest.mark.engines
def test_broken_runs_come_out_whole(tmp_path):
    tiny = tiny_run.make(tmp_path)
    prompts = tmp_path / "given.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i:03} w007", "completion": f"w011 w{i:03}"}) + "\n" for i in range(30)))
    words = {"estimator": {"name": "tests.tools.test_chaos:Given"}, "data": {"prompts": str(prompts)}}
    setup = Setup(config=tiny.config("chaos", **words), settings=(), colocated=(False,), steps=STEPS, batch=BATCH)
    no_teacher = ("estimator.name=sft", "teacher.backend=none")  # noise needs none, and this saves its start
    setups = {
        0: replace(setup, only=("damage",)),
        5: replace(setup, only=("stop",)),  # at max_lag 4
        2: replace(setup, only=("noise",), settings=no_teacher),
    }
    with ThreadPoolExecutor(len(setups)) as pool:
        found = list(pool.map(lambda seed: chaos(setups[seed], [seed]), setups))
    assert not [one for one in found if one.bad]
    assert [(one.runs, one.faults) for one in found] == [(1, {one.only[0]: 1}) for one in setups.values()]


def lines(*prompts, lag=0):
    return [{"prompts": list(one), "sequences": BATCH, "lags": {"0": 3, str(lag): 1}} for one in prompts]


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (lines((0, 4), (4, 8)), {}),
        (lines((0, 4)), {"lost": 4}),
        (lines((0, 4), (4, 8), (4, 8)), {"twice": 4}),
        (lines((0, 4), (3, 7)), {"lost": 1, "twice": 1}),
        ([*lines((0, 4)), *lines((4, 8), lag=2)], {"lag_violations": 1}),
        ([*lines((0, 4)), {**lines((4, 8))[0], "sequences": 3}], {"lost": 1}),
    ],
)
def test_the_audit_sees_what_is_wrong(steps, wanted):
    found = Findings()
    audit(steps, Setup(steps=2, batch=BATCH), 1, found)
    assert {name: count for name in ("lost", "twice", "lag_violations") if (count := getattr(found, name))} == wanted
    assert found.bad == bool(wanted)
