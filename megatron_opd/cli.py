"""The command line: `megatron-opd train | launch | plan | convert | step | role`."""

import argparse
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from megatron_opd import config as configs
from megatron_opd import placement
from megatron_opd.errors import ConfigError, DoesNotFitError, OPDError
from megatron_opd.launch import LAUNCHER, STOPPED, Children, StopRequest, alone_in, ends_at, prepare
from megatron_opd.placement import Process, Resources, place
from megatron_opd.progress import Progress, console, tell
from megatron_opd.recovery import rewind
from megatron_opd.runtime.report import report_death

_ROLES = ("controller", "learner", "rollout", "teacher", "evaluate")


def main() -> None:
    """Runs one command; exit code 0 only if it did what was asked."""
    arguments = _arguments()
    if arguments.run is not _role:  # whose log keeps them
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")  # what is not installed here, seven times
    try:
        arguments.run(arguments)
    except OPDError as error:
        sys.stdout.flush()  # the error is the last thing that a reader sees
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("interrupted; all roles have ended, what was finished is in the run directory and --resume goes on from it", file=sys.stderr)
        sys.exit(130)


def _arguments() -> argparse.Namespace:
    """argparse ends a list of overrides at the first option; those behind it come back as unknown and are put with the others."""
    parser = _parser()
    arguments, rest = parser.parse_known_args()
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-opd", description="On-policy distillation with a Megatron-Core learner and vLLM rollouts."
    )
    parser.add_argument("--version", action="version", version=f"megatron-opd {metadata.version('megatron-opd')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run all roles on this machine, then evaluate")
    _add_config(train)
    train.add_argument("--resume", action="store_true", help="go on with the run in run.dir where it stopped, or start it if there is none")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the resolved config and the roles, start nothing")
    train.set_defaults(run=_train)

    launch = commands.add_parser("launch", help="run all roles on a cluster")
    slurm = launch.add_subparsers(required=True, metavar="WHERE").add_parser("slurm", help="as one SLURM job")
    _add_config(slurm)
    slurm.add_argument("--resume", action="store_true", help="go on with the run in run.dir where it stopped, or start it if there is none")
    slurm.add_argument("--dry-run", action="store_true", help="check everything, print config, roles and the job's script; submit nothing")
    slurm.add_argument(
        "--configs-only",
        action="store_true",
        help="of model folders check config.json alone, not weights or tokenizers, and no prompts: for a dry run where they are not",
    )
    slurm.set_defaults(run=_launch_slurm)

    plan = commands.add_parser("plan", help="does it fit, how fast will it be? No GPU is needed to know")
    _add_config(plan)
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    plan.set_defaults(run=_plan)

    _add_convert(commands.add_parser("convert", help="checkpoints between Hugging Face and Megatron-Core"))

    step = commands.add_parser("step", help="run this node's processes of one role (what a SLURM job calls)")
    step.add_argument("config", type=Path, help="the resolved config.yaml in the run directory")
    step.add_argument("role", choices=_ROLES)
    step.set_defaults(run=_step)

    role = commands.add_parser("role", help="run one process of a role (what the launchers call)")
    role.add_argument("name", choices=_ROLES)
    role.add_argument("config", type=Path, help="the resolved config.yaml in the run directory")
    role.add_argument("--index", type=int, default=0, help="among the processes of this role")
    role.add_argument("--host", help="address of this machine that it binds to (default: run.host)")
    role.set_defaults(run=_role)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file, as loop.max_lag=2")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    described = {
        "hf-to-megatron": "safetensors to a distributed checkpoint, proven byte for byte",
        "megatron-to-hf": "a distributed checkpoint of any layout to safetensors, proven byte for byte",
        "verify": "compare two folders of either format: configs, tensors, bytes, logits",
        "inspect": "what a folder of either format holds",
    }
    for name, help_text in described.items():
        action = actions.add_parser(name, help=help_text)
        action.add_argument("source", type=Path)
        if name != "inspect":
            action.add_argument("target", type=Path)
        action.add_argument("--config", type=Path, metavar="FOLDER", help="config.json and tokenizer for a checkpoint that lacks them")
        action.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="round to this first (default: as stored)")
        if name == "hf-to-megatron":
            _add_layout(action)
        action.add_argument("--no-logits", dest="logits", action="store_false", help="compare bytes only")
        action.add_argument("--digest", action="store_true", help="inspect: read all and print 128 bits that tell models apart")
        action.set_defaults(run=_convert)


def _add_layout(action: argparse.ArgumentParser) -> None:
    described = {
        "tensor": "cut as N ranks read it; any other layout can read it too",
        "pipeline": "refuse what N pipeline stages cannot share",
        "expert": "refuse what N ranks cannot share the experts of",
    }
    for kind, help_text in described.items():
        action.add_argument(f"--{kind}-parallel", f"--{kind[0]}p", type=int, default=1, metavar="N", help=help_text)


def _convert(arguments: argparse.Namespace) -> None:
    from megatron_opd.convert import run

    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("interrupted; an unfinished conversion has no target yet and continues when the same command is run again", file=sys.stderr)
        sys.exit(130)


def _train(arguments: argparse.Namespace) -> None:
    config = configs.load(arguments.config, arguments.overrides)
    from megatron_opd.preflight import build_estimator, check, with_estimator_settings

    config, needs = with_estimator_settings(config), build_estimator(config).needs
    processes = place(config, _this_machine(config), generation=needs.generation)
    checked = check(config)  # what can be refused is refused before a process starts, or a directory is made
    if arguments.dry_run:
        console().print(configs.to_yaml(config), _roles(processes), highlight=False)
        found = f"{len(checked.records)} prompts, {len(checked.heldout)} held-out ones"
        console().print(f"checked: models, tokenizers, settings and {found}; nothing was started", highlight=False)
        return
    with alone_in(Path(config.run.dir)):
        _run(config, processes, StopRequest(ends_at(config.checkpoint)), resume=arguments.resume)


def _run(config: configs.Config, processes: tuple[Process, ...], stop: StopRequest, *, resume: bool) -> None:
    """Loop and evaluation."""
    there = Path(config.run.dir, "config.yaml").exists()
    folder, version = prepare(config, processes, resume=resume)
    begins = f"going on behind step {version}" if there else f"nothing to resume in {folder}: starting"
    if not (folder / "summary.json").exists():
        _loop(config, processes, folder, stop, begins if resume else "starting")
    elif resume:
        _tell(f"the run in {folder} has made its {version} steps; raise loop.steps to go on")
    for evaluation in (process for process in processes if process.role == "evaluate"):
        console().print(f"evaluating on {config.eval.prompts}", highlight=False)
        with console().status("evaluating on held-out prompts"), Children(folder, config) as children:
            children.start(evaluation)
            try:
                children.watch("evaluate", lambda: None, stop, timeout_s=config.eval.timeout_s)
            except KeyboardInterrupt:
                if not stop.made:
                    raise
                _stopped("before the end of the evaluation", stop, folder)
    from megatron_opd.summary import show

    show(folder / "summary.json", console())


def _loop(config: configs.Config, processes: tuple[Process, ...], folder: Path, stop: StopRequest, begins: str) -> None:
    """Runs all roles but the evaluation up to the last step, or to a request to stop, which ends this process too."""
    loop = [process for process in processes if process.role != "evaluate"]
    _tell(f"{begins} with {len(loop)} processes, logs in {folder / 'logs'}")
    with Progress(folder / "metrics.jsonl", config.loop.steps, console()) as progress, Children(folder, config, _tell) as children:
        for process in loop:
            children.start(process)
        children.watch("controller", progress.update, stop)
    if not (folder / "summary.json").exists():
        _stopped(f"before step {config.loop.steps}", stop, folder)


def _stopped(where: str, stop: StopRequest, folder: Path) -> NoReturn:
    _tell(f"stopped {where}, {stop.why}; go on with: megatron-opd train {folder / 'config.yaml'} --resume")
    sys.exit(STOPPED)


def _plan(arguments: argparse.Namespace) -> None:
    config = configs.load(arguments.config, arguments.overrides)
    from megatron_opd.plan.plan import make_plan
    from megatron_opd.plan.show import show

    try:
        plan = make_plan(config)
    except DoesNotFitError as error:
        if arguments.json:
            arguments.json.write_text(json.dumps({"fits": False, "reason": str(error)}, indent=1) + "\n")
        raise
    show(plan, config, console())
    if arguments.json:
        arguments.json.write_text(json.dumps(plan.to_json(), indent=1) + "\n")


def _launch_slurm(arguments: argparse.Namespace) -> None:
    from megatron_opd import preflight, slurm

    config = configs.load(arguments.config, arguments.overrides)
    if arguments.configs_only and not arguments.dry_run:
        raise ConfigError("--configs-only leaves weights, tokenizers and prompts unchecked; it goes with --dry-run only")
    config, needs = preflight.with_estimator_settings(config), preflight.build_estimator(config).needs
    processes = place(config, placement.cluster_resources(config), generation=needs.generation)
    script = slurm.script(config, processes)
    preflight.check_configs(config) if arguments.configs_only else preflight.check(config)
    if arguments.dry_run:
        console().print(configs.to_yaml(config), _roles(processes), script, highlight=False, markup=False, soft_wrap=True)
        return
    slurm.require_sbatch()
    with alone_in(Path(config.run.dir)):
        folder, _ = prepare(config, processes, resume=arguments.resume)
    file = folder / "job.sbatch"
    file.write_text(script)
    job = slurm.submit(file)
    console().print(f"job {job} submitted: {file}\nits output: {folder / 'job.log'}, logs of the roles: {folder / 'logs'}", highlight=False)


def _step(arguments: argparse.Namespace) -> None:
    from megatron_opd.slurm import run_step
    from megatron_opd.summary import show

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    config = configs.load(arguments.config)
    folder, last = Path(config.run.dir), "evaluate" if config.eval.prompts else "controller"
    try:
        if arguments.role == "controller":
            with alone_in(folder):
                rewind(config, folder)  # a job that was requeued goes on behind its last checkpoint
                with Progress(folder / "metrics.jsonl", config.loop.steps, console()) as progress:
                    run_step(config, arguments.role, progress.update)
        else:
            run_step(config, arguments.role, lambda: None)
    except KeyboardInterrupt:
        sys.exit(143)  # the job ends this step because of another one, which has said why
    if arguments.role == last and (folder / "summary.json").exists():
        show(folder / "summary.json", console())


def _this_machine(config: configs.Config) -> Resources:
    """CPU cores are not counted here: roles share them unless their own setting pins them."""
    if config.run.device == "cpu":
        return Resources(nodes=1)
    from torch.cuda import device_count

    return Resources(nodes=1, gpus_per_node=device_count())


def _tell(line: str) -> None:
    tell(console(), line)


def _roles(processes: tuple[Process, ...]) -> Table:
    table = Table("process", "replica", "rank", "node", "GPUs", "cores", title="roles")
    for process in processes:
        devices, cores = (", ".join(map(str, numbers)) or "any" for numbers in (process.devices, process.cores))
        table.add_row(process.name, str(process.replica), f"{process.rank}/{process.world_size}", str(process.node), devices, cores)
    return table


def _role(arguments: argparse.Namespace) -> None:
    from megatron_opd.runtime.process import die_with_parent, pin

    if launcher := os.environ.get(LAUNCHER):
        die_with_parent(int(launcher))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    config = configs.load(arguments.config)
    if arguments.host:
        config = replace(config, run=replace(config.run, host=arguments.host))
    try:
        process = _process(config, arguments.name, arguments.index)
        pin(process.cores)
        from megatron_opd.roles import run_role

        run_role(config, process)
    except BaseException as error:  # a role's outermost line: the launcher must learn what it died of
        report_death(_root(error))
        try:
            traceback.print_exc()
        finally:
            os._exit(1)  # engines and process groups of a broken role may block an orderly exit for ever


def _process(config: configs.Config, name: str, index: int) -> Process:
    processes = [process for process in placement.load(Path(config.run.dir)) if process.role == name]
    if not 0 <= index < len(processes):
        raise ConfigError(f"role {name} has {len(processes)} processes by this config, so --index={index} is not one of them")
    return processes[index]


def _root(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
