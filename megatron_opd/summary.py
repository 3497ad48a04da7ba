"""The end of a run in one table."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def show(file: Path, console: Console) -> None:
    """Prints `summary.json` for people."""
    s = json.loads(file.read_text())
    table = Table("what", "figure", title="run summary", show_header=False)
    for name in ("accuracy", "kl"):
        found = [f"{s[key]:.4f}" for key in (f"{name}_before", f"{name}_after") if s[key] is not None]
        if found:
            unit = "held-out exact match" if name == "accuracy" else "held-out KL to the teacher, nats/token"
            table.add_row(unit, " -> ".join(found))
    if s["teacher_accuracy"] is not None:
        table.add_row("teacher's held-out exact match", f"{s['teacher_accuracy']:.4f}")
    table.add_row("steps, response tokens, seconds of the loop", f"{s['steps']}, {s['tokens']}, {s['wall_seconds']:.1f}")
    table.add_row("tokens/s end to end", f"{s['tokens_per_second']:.0f}")
    table.add_row("tokens/s by busy role", ", ".join(f"{role} {rate:.0f}" for role, rate in s["tokens_per_second_by_stage"].items()))
    table.add_row("lag: bound, observed", f"{s['max_lag']}, {s['observed_lag_max']}")
    table.add_row("lag histogram (tokens)", ", ".join(f"{lag}: {count}" for lag, count in s["lag_histogram"].items()))
    table.add_row("busy seconds of all roles / wall", f"{s['overlap']:.2f}")
    stages = {name: value for name, value in s["seconds_by_stage"].items() if "." not in name}
    table.add_row("seconds by stage of the loop", ", ".join(f"{name} {value:.1f}" for name, value in stages.items()))
    if s.get("set_aside"):
        table.add_row("prompts set aside, see quarantine.jsonl", str(s["set_aside"]))
    table.add_row("Hugging Face export", s["hf_export"])
    console.print(table)
