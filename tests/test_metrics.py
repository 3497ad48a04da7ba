"""metrics.jsonl goes on where a checkpoint says that it stood."""

import json
import math

from megatron_opd.metrics import StepLog
from megatron_opd.types import StepReport


def report(version, **changes):
    fields = {"loss": 0.5, "diagnostics": {"kl": 0.1}, "kl_by_position": {0: 0.2}, "grad_norm": 1.0, "learning_rate": 1e-3}
    return StepReport(version=version, sequences=2, tokens=9, lags={0: 9}, seconds={}, **(fields | changes))


def write(log, version, **changes):
    log.write(report(version, **changes), {"wait": 0.1}, prompts=range(2 * version - 2, 2 * version), mean_length=4.5, stopped=1.0)


def versions(tmp_path):
    return [json.loads(line)["version"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_steps_behind_a_checkpoint_are_taken_back_and_a_torn_line_with_them(tmp_path):
    first = StepLog(tmp_path)
    write(first, 1)
    write(first, 2)
    size = first.size
    first.sync()
    write(first, 3)
    (tmp_path / "metrics.jsonl").open("a").write('{"version": 4, "lo')  # the process dies here
    second = StepLog(tmp_path, version=2, size=size)
    write(second, 3, loss=math.nan, skipped=True)
    second.close()
    assert versions(tmp_path) == [1, 2, 3]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] and math.isnan(last["loss"]) and last["prompts"] == [4, 6]


def test_a_file_that_lost_its_end_is_not_filled_up(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"version": 1}\n')
    log = StepLog(tmp_path, version=2, size=1000)
    write(log, 3)
    log.close()
    assert versions(tmp_path) == [1, 3]
