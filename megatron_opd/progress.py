"""What the user sees of a run. It reads `metrics.jsonl` and nothing else, so it works for any run, local or not."""

import errno
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table


class Progress:
    """Live on a terminal, one line per step elsewhere. Use as a context manager."""

    def __init__(self, metrics: Path, steps: int, console: Console) -> None:
        self._metrics = metrics
        self._offset = metrics.stat().st_size if metrics.exists() else 0  # a resumed run's earlier steps were shown before
        self._console = console
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("steps", total=steps)
        self._live = Live(self._bar, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self) -> None:
        """Shows the steps that have been written since the last call."""
        if not self._metrics.exists():
            return
        with self._metrics.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._show(json.loads(line))

    def _show(self, step: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=step["version"])
        if self._live:
            self._live.update(Group(_table(step), self._bar))
        else:
            tell(self._console, _line(step))


def _values(step: dict[str, Any]) -> dict[str, str]:
    values = {"tokens/s": f"{step['tokens_per_second']:.0f}", "loss": f"{step['loss']:.4f}"}
    if "kl" in step["diagnostics"]:
        values["KL"] = f"{step['diagnostics']['kl']:.4f}"
    values |= {
        "lag": str(max(map(int, step["lags"]), default=0)),
        "grad": f"{step['grad_norm']:.3f}",
        "length": f"{step['mean_length']:.1f}",
    }
    return values | {f"{stage} s": f"{seconds:.2f}" for stage, seconds in step["stage_seconds"].items()}


def _table(step: dict[str, Any]) -> Table:
    table = Table(box=None)
    values = _values(step)
    for name in values:
        table.add_column(name, justify="right")
    table.add_row(*values.values())
    return table


def _line(step: dict[str, Any]) -> str:
    return f"step {step['version']}  " + "  ".join(f"{name} {value}" for name, value in _values(step).items())


def tell(console: Console, line: str) -> None:
    """Prints a line; a run goes on without it if the disk that it goes to is full."""
    try:
        console.print(line, highlight=False, soft_wrap=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def console() -> Console:
    """The console of the command line; wide enough not to fold lines where there is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=200)
