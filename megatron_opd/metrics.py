"""What a run leaves for people to read: one JSON line and one TensorBoard point per optimizer step."""

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megatron_opd.runtime.whole import append
from megatron_opd.types import StepReport

_LOG = logging.getLogger(__name__)


class StepLog:
    """Writes `metrics.jsonl` and TensorBoard events; a step is on disk when `write` returns."""

    def __init__(self, folder: Path, *, version: int = 0, size: int = 0) -> None:
        """Goes on behind step `version`, at which metrics.jsonl had `size` bytes; what later steps wrote is taken back."""
        self._lines = (folder / "metrics.jsonl").open("ab", buffering=0)
        self._lines.truncate(min(size, self._lines.tell()))
        self._lines.seek(0, os.SEEK_END)
        self._board_folder = str(folder / "tensorboard")
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = version + 1  # None: done
        self._last = time.monotonic()

    @property
    def size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._lines.tell()

    def write(self, report: StepReport, seconds: dict[str, float], *, prompts: range, mean_length: float, stopped: float) -> None:
        """One step on `prompts`, less those that were set aside.

        `seconds` are the controller's stages, `stopped` is the share of responses that ended by themselves.

        Raises:
            OSError: the line is not written, not even in part; the call may be repeated.
        """
        now = time.monotonic()
        step_s = now - self._last
        line = asdict(report) | {
            "prompts": [prompts.start, prompts.stop],
            "time": time.time(),
            "step_seconds": step_s,
            "tokens_per_second": report.tokens / step_s,
            "stage_seconds": seconds,
            "mean_length": mean_length,
            "stopped": stopped,
        }
        append(self._lines, json.dumps(line).encode() + b"\n")
        self._last = now
        points = {"loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
        points |= {"tokens_per_second": line["tokens_per_second"], "mean_length": mean_length, "stopped": stopped}
        points |= {"lag_max": max(report.lags, default=0)} | report.diagnostics
        points |= {f"kl_by_position/{first}": kl for first, kl in report.kl_by_position.items()}
        self._draw(points, report.version)

    def _draw(self, points: dict[str, float], version: int) -> None:
        try:
            if self._board is None:
                self._board = SummaryWriter(self._board_folder, purge_step=self._purge_step)
                self._purge_step = None
            for name, value in points.items():
                self._board.add_scalar(name, value, version)
            self._board.flush()
        except OSError as error:
            _LOG.warning("TensorBoard lacks step %d, which metrics.jsonl has: %s", version, error)
            self._board = None  # a writer that failed once fails for ever

    def sync(self) -> None:
        """Returns once metrics.jsonl would survive the machine."""
        os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Closes the files; every step is on disk."""
        self._lines.close()
        if self._board is not None:
            self._board.close()
