"""A real SLURM with two nodes on this machine, from Debian's slurm-wlm and munge."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "scontrol", "/usr/sbin/slurmctld", "/usr/sbin/slurmd", "/usr/sbin/munged")
KILL_WAIT_S = 5  # between SLURM's SIGTERM and its SIGKILL
_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/munge
SlurmUser={user}
SlurmctldPort={control}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1
ReturnToService=2
EnforcePartLimits=ALL
MpiDefault=none
KillWait={kill_wait_s}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr={address} Port={second} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"SLURM IS NOT TESTED: {', '.join(absent)} not installed; run: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM IS NOT TESTED: its daemons want to be started by root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two nodes, of different addresses where the machine has two; yields the variables that SLURM's commands need."""
    ports = dict(zip(("control", "first", "second"), _free_ports(3)))
    (folder / "state").mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, user=getpass.getuser(), address=_second_address(), kill_wait_s=KILL_WAIT_S, **ports))
    environment = {"SLURM_CONF": str(conf)}
    _munge()
    variables = {**os.environ, **environment}
    daemons = []
    try:
        for command in (["/usr/sbin/slurmctld", "-D"], ["/usr/sbin/slurmd", "-D", "-N", "n1"], ["/usr/sbin/slurmd", "-D", "-N", "n2"]):
            daemons.append(subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _await_idle(variables, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=variables, capture_output=True)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def _await_idle(variables: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        states = subprocess.run(["sinfo", "--noheader", "--format=%T %D"], env=variables, capture_output=True, text=True).stdout.strip()
        if states == "idle 2":
            return
        log = folder / "slurmctld.log"
        assert time.monotonic() < deadline, f"nodes are {states!r}: {log.read_text()[-2000:] if log.exists() else 'no log'}"
        time.sleep(0.2)


def _munge() -> None:
    works = "munge -n | unmunge"
    if subprocess.run(works, shell=True, capture_output=True).returncode == 0:
        return
    subprocess.run(
        "mkdir -p /run/munge && chown munge /run/munge && su -s /bin/sh munge -c '/usr/sbin/munged --force'", shell=True, check=True
    )
    deadline = time.monotonic() + 10
    while subprocess.run(works, shell=True, capture_output=True).returncode:
        assert time.monotonic() < deadline, "munged does not answer"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def _second_address() -> str:
    """This machine's address to the outside; no packet is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
