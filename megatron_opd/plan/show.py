"""A plan for people."""

from rich.console import Console
from rich.table import Table

from megatron_opd.config import Config
from megatron_opd.plan.plan import Plan, stage_seconds


def show(plan: Plan, config: Config, console: Console) -> None:
    """Prints memory, speed, bottleneck and split."""
    console.print(_memory(plan, config), _speed(plan), highlight=False)
    stages = stage_seconds(config, plan.costs, plan.lengths)
    console.print(f"a batch takes each role, were it never to wait: {', '.join(f'{name} {s:.2f} s' for name, s in stages.items())}")
    console.print(f"teacher payload: {plan.payload_bytes} bytes per response token")
    console.print(f"bottleneck at max_lag={config.loop.max_lag}: {plan.bottleneck}")
    if plan.split is not None:
        split = plan.split
        console.print(
            f"best split of the same GPUs: learner.data_parallel={split.learner_data_parallel} rollout.replicas={split.rollout_replicas} "
            f"teacher.replicas={split.teacher_replicas} (slowest role {split.step_s:.2f} s; memory to be planned again)"
        )
    source = plan_source(config)
    console.print(f"speeds: {source}")


def plan_source(config: Config) -> str:
    """Where the speeds come from."""
    if config.plan.calibration:
        return f"measured in {config.plan.calibration}"
    return f"data sheet of {config.cluster.gpu} and shares of it in megatron_opd/plan/gpus.py: a guess until plan.calibration names a run"


def _memory(plan: Plan, config: Config) -> Table:
    where = f"a {config.cluster.gpu} has {plan.limit_bytes / 1e9:.0f}" if config.run.device == "cuda" else "of one process"
    table = Table("role", "GB in all", "by component", title=f"GB on the fullest device of each role; {where}")
    for role, parts in plan.memory.items():
        components = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        table.add_row(role, f"{sum(parts.values()) / 1e9:.2f}", components)
    return table


def _speed(plan: Plan) -> Table:
    table = Table("max_lag", "s/step", "tokens/s", "over max_lag 0", "mean lag", "busy share", title="simulated steady state")
    for lag, outcome in plan.outcomes.items():
        busy = ", ".join(f"{role} {share:.2f}" for role, share in outcome.busy.items())
        gain = outcome.tokens_s / plan.outcomes[0].tokens_s
        table.add_row(str(lag), f"{outcome.step_s:.2f}", f"{outcome.tokens_s:.0f}", f"{gain:.2f}", f"{outcome.lag:.2f}", busy)
    return table
