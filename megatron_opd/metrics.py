"""What a run leaves for people to read: one JSON line and one TensorBoard point per optimizer step."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_opd.types import StepReport


class StepLog:
    """Writes `metrics.jsonl` and TensorBoard events; a step is on disk when `write` returns."""

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._last = time.monotonic()

    def write(self, report: StepReport, seconds: dict[str, float], *, mean_length: float, stopped: float) -> None:
        """One step. `seconds` are the controller's stages, `stopped` the share of responses that ended by themselves."""
        now = time.monotonic()
        step_s, self._last = now - self._last, now
        line = asdict(report) | {
            "time": time.time(),
            "step_seconds": step_s,
            "tokens_per_second": report.tokens / step_s,
            "stage_seconds": seconds,
            "mean_length": mean_length,
            "stopped": stopped,
        }
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        points = {"loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
        points |= {"tokens_per_second": line["tokens_per_second"], "mean_length": mean_length, "stopped": stopped}
        points |= {"lag_max": max(report.lags, default=0)} | report.diagnostics
        points |= {f"kl_by_position/{first}": kl for first, kl in report.kl_by_position.items()}
        for name, value in points.items():
            self._board.add_scalar(name, value, report.version)
        self._board.flush()

    def close(self) -> None:
        """Flushes everything to disk."""
        self._lines.close()
        self._board.close()
