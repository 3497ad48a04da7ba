"""A run as one SLURM job: the script that is submitted, and what each of its steps does on each of its nodes.

One step per role: `srun` starts `megatron-opd step ROLE` once on every node that the placement gives to the role, and that
starts the role's processes there as the local launcher would. It knows SLURM's words; it refuses to know what roles do.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_opd import placement
from megatron_opd.config import Config
from megatron_opd.errors import ConfigError
from megatron_opd.launch import Children, RoleDied
from megatron_opd.placement import Process

NODES = "MEGATRON_OPD_NODES"  # "name=address ..." of the job's nodes, in the order in which placement counts them

_SCRIPT = """\
#!/bin/bash
{directives}
# Made by `megatron-opd launch slurm`. One step per role; placement.json in the run directory says what a step starts on a node.
# A step that fails leaves its reason in failures/ and ends the job; USR1 asks the controller to save and to end.
set -u
cd {launch_dir}
run={run_dir}
{setup}
nodes=() {variable}=
for name in $(scontrol show hostnames "{node_list}"); do
  nodes+=("$name")
  {variable}+="$name=$(scontrol --oneliner show node "$name" | sed 's/.* NodeAddr=\\([^ ]*\\).*/\\1/') "
done
export {variable} PYTHONUNBUFFERED=1
if [ ${{#nodes[@]}} != {count} ]; then
  echo "this run is placed on {count} nodes, the job has ${{#nodes[@]}}: ${{nodes[*]}}; submit it with --nodes={count}" >&2
  exit 1
fi
rm -rf "$run/controller.json" "$run/rendezvous" "$run/failures"  # of an attempt that was requeued
mkdir -p "$run/failures"

declare -A steps  # process id of srun -> role
step() {{  # ROLE HET_GROUP NODE...
  local role=$1 group=$2 names="" node
  shift 2
  for node; do names+="${{nodes[$node]}},"; done
  srun --overlap --kill-on-bad-exit=1{group_option} --nodes=$# --ntasks=$# --ntasks-per-node=1 --nodelist="${{names%,}}" \\
    {command} step "$run/config.yaml" "$role" &
  steps[$!]=$role
}}

finish() {{  # returns when all steps have ended well; the first that does not ends the others and the job
  local process status role
  while [ ${{#steps[@]}} -gt 0 ]; do
    for process in "${{!steps[@]}}"; do
      kill -0 "$process" 2>/dev/null && continue
      wait "$process"
      status=$? role=${{steps[$process]}}
      unset "steps[$process]"
      [ $status = 0 ] || fail "$role" $status
    done
    sleep 0.5 &
    wait $!  # a trap need not wait for its end
  done
}}

fail() {{  # ROLE STATUS: those that the first failure takes with it fail too, so all may speak before the verdict
  sleep 3
  for process in "${{!steps[@]}}"; do kill -TERM "$process" 2>/dev/null; done
  wait
  local first
  first=$(ls "$run/failures" | sort | head -n 1)
  if [ -n "$first" ]; then cat "$run/failures/$first" >&2; else echo "step $1 ended with exit code $2 and left no reason; see above" >&2; fi
  exit 1
}}

asked=0
trap 'asked=1; for process in "${{!steps[@]}}"; do [ "${{steps[$process]}}" != controller ] || kill -USR1 "$process"; done' USR1

{steps}
finish
{requeue}{evaluation}"""

_REQUEUE = """\
if [ $asked = 1 ] && [ ! -e "$run/summary.json" ]; then
  echo "saved before the end; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
"""


def script(config: Config, processes: tuple[Process, ...]) -> str:
    """The whole sbatch script of a run.

    Raises:
        ConfigError: there is no time limit, no GPU is asked for that is needed, or the learner's nodes cannot be a component of their own.
    """
    settings, count = config.slurm, config.cluster.nodes
    if not settings.time:
        raise ConfigError("slurm.time is missing; name the job's time limit, e.g. slurm.time=24:00:00")
    first = _first_component(config, processes)
    het = first < count
    for name in ("options", "hetjob_options") if het else ("options",):
        if config.run.device == "cuda" and not any(option.startswith(("--gres", "--gpus")) for option in getattr(settings, name)):
            raise ConfigError(f"slurm.{name} asks for no GPUs, so a job would start without; add --gres=gpu:{config.cluster.gpus_per_node}")
    return _SCRIPT.format(
        directives=_directives(config, first),
        launch_dir=shlex.quote(os.getcwd()),
        run_dir=shlex.quote(config.run.dir),
        setup=f"{settings.setup.rstrip()}\n" if settings.setup else "",
        variable=NODES,
        node_list="$SLURM_JOB_NODELIST_HET_GROUP_0,$SLURM_JOB_NODELIST_HET_GROUP_1" if het else "$SLURM_JOB_NODELIST",
        count=count,
        group_option=' --het-group="$group"' if het else "",
        command=_command(config),
        steps="\n".join(_steps([process for process in processes if process.role != "evaluate"], first)),
        requeue=_REQUEUE if settings.requeue else "",
        evaluation="".join(f"{line}\nfinish\n" for line in _steps([p for p in processes if p.role == "evaluate"], first)),
    )


def submit(script_file: Path) -> str:
    """The job's number.

    Raises:
        ConfigError: `sbatch` is not here, or refuses.
    """
    done = subprocess.run(["sbatch", "--parsable", str(script_file)], capture_output=True, text=True)
    if done.returncode:
        script_file.unlink()  # a directory with a script in it may belong to a job that waits
        reason = done.stderr.strip().splitlines()
        raise ConfigError(f"sbatch refuses {script_file}: {reason[-1] if reason else f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def require_sbatch() -> None:
    """Raises ConfigError where SLURM is not."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on the PATH; submit from a login node of the cluster, or add --dry-run to see the job")


def run_step(config: Config, role: str, show: Callable[[], None]) -> None:
    """Runs what the placement gives this node of one role until it has ended well; calls `show` many times a second.

    SIGUSR1 goes on to the role's processes: the controller alone is sent it.

    Raises:
        RoleDied: a process failed; its own last error is left in `failures/` too, under a name that sorts causes first.
    """
    folder = Path(config.run.dir)
    node, host = _whereabouts(config)
    here = replace(config, run=replace(config.run, host=host))
    mine = [process for process in placement.load(folder) if (process.role, process.node) == (role, node)]
    if not mine:
        raise ConfigError(f"{folder} places no {role} on node {node}; submit the script that `launch slurm` made for it")
    try:
        with Children(folder, here) as children:
            for process in mine:
                children.start(process)
            signal.signal(signal.SIGUSR1, lambda number, frame: children.forward(signal.Signals(number)))
            children.watch(role, show)
    except RoleDied as died:
        (folder / "failures" / f"{died.distance}-{died.time_s:017.6f}-{role}-{node}").write_text(f"{died}\n")
        raise


def _whereabouts(config: Config) -> tuple[int, str]:
    """This node's number in the placement, and the address that its roles bind to: loopback where there is no other node."""
    nodes = [word.partition("=")[::2] for word in os.environ.get(NODES, "").split()]
    name = os.environ.get("SLURMD_NODENAME", "")
    if name not in dict(nodes):
        raise ConfigError(
            f"SLURMD_NODENAME={name!r} is none of {NODES}={os.environ.get(NODES)!r}; `step` runs inside a job of `launch slurm`"
        )
    number = [known for known, _ in nodes].index(name)
    return number, config.run.host if len(nodes) == 1 else socket.gethostbyname(dict(nodes)[name])


def _first_component(config: Config, processes: tuple[Process, ...]) -> int:
    """How many nodes the first component of a heterogeneous job has; all of them in another job."""
    if not config.slurm.hetjob_options:
        return config.cluster.nodes
    learner = {process.node for process in processes if process.role == "learner"}
    if learner != set(range(len(learner))) or len(learner) == config.cluster.nodes:
        raise ConfigError(
            f"slurm.hetjob_options make a component of the nodes without a learner, behind the learner's, but learners run on nodes "
            f"{sorted(learner)} of {config.cluster.nodes}; set cluster.learner to the first nodes, or leave hetjob_options out"
        )
    return len(learner)


def _directives(config: Config, first: int) -> str:
    settings, second = config.slurm, config.cluster.nodes - first
    log = (Path(config.run.dir) / "job.log").absolute()
    lines = [
        f"--job-name={settings.job_name}",
        f"--time={settings.time}",
        f"--signal=B:USR1@{settings.signal_s}",
        "--requeue" if settings.requeue else "--no-requeue",
        f"--output={log}",
        "--open-mode=append",
        *_component(first, settings.options),
        *(["hetjob", f"--time={settings.time}", *_component(second, settings.hetjob_options)] if second else []),
    ]
    return "\n".join(f"#SBATCH {line}" for line in lines)


def _component(nodes: int, options: tuple[str, ...]) -> list[str]:
    return [f"--nodes={nodes}", "--ntasks-per-node=1", "--exclusive", *options]


def _command(config: Config) -> str:
    settings = config.slurm
    if not settings.container_image:
        return f"{shlex.quote(sys.executable)} -m megatron_opd"
    mounts = f" --container-mounts={shlex.quote(settings.container_mounts)}" if settings.container_mounts else ""
    return f'--container-image={shlex.quote(settings.container_image)}{mounts} --container-workdir="$PWD" megatron-opd'


def _steps(processes: list[Process], first: int) -> list[str]:
    """One line for each role, or for what of it runs in each component."""
    spots: dict[tuple[str, int], dict[int, None]] = {}
    for process in processes:
        spots.setdefault((process.role, int(process.node >= first)), {})[process.node] = None
    return [f"step {role} {group} {' '.join(map(str, sorted(nodes)))}" for (role, group), nodes in spots.items()]
