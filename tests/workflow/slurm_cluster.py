"""A Slurm of two nodes on this machine: slurmctld, a slurmd for each node, munge."""

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "sacct", "sacctmgr")
NEEDED = (*COMMANDS, "munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=6
KillWait=2
MinJobAge=600
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_setup_env_fail
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=batch Nodes=node[1-2] Default=YES PriorityTier=1 State=UP
PartitionName=urgent Nodes=node[1-2] PriorityTier=2 PreemptMode=off State=UP
"""


def missing() -> list[str]:
    """Return the commands of Slurm and munge that are not installed."""
    return [name for name in NEEDED if shutil.which(name) is None]


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    """Starts in a folder; ``bin`` holds Slurm's commands, told where this cluster is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool-node1", "spool-node2", "bin"):
            (folder / name).mkdir(parents=True)
        memory = min(7000, psutil.virtual_memory().total // 2_200_000)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=os.environ.get("USER", "root"),
            folder=folder,
            ports=free_ports(3),
            node=f"CPUs=2 RealMemory={memory} Gres=gpu:1 State=UNKNOWN",
        )
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n", encoding="utf-8")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for name in COMMANDS:  # jobs get none of the SLURM_ variables from the plugin
            file = folder / "bin" / name
            file.write_text(
                f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n',
                encoding="utf-8",
            )
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        self.daemon(
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--seed-file={folder}/munge.seed"),
            *(f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"),
            f"--log-file={folder}/munge.log",
        )
        self.wait_until(lambda: (folder / "munge.socket").exists())
        self.daemon("slurmctld", "-D")
        for name in ("node1", "node2"):
            self.start_node(name)
        self.wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def daemon(self, *command: str) -> None:
        """Start a process that runs until the end."""
        started = subprocess.Popen(
            command,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.daemons.append(started)

    def start_node(self, name: str) -> None:
        """Start the daemon of one node."""
        self.daemon("slurmd", "-D", "-N", name)

    def run(self, command: str, *options: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            [self.folder / "bin" / command, *options], capture_output=True, text=True, check=False
        )
        return done.stdout

    def wait_until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, self.run("sinfo") + self.run("squeue")
            time.sleep(0.2)

    def lose(self, name: str) -> None:
        """Kill a node with everything that runs on it."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[:1] and words[0].endswith("slurmd") and name in words:
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()
        stepd = f"slurmstepd: [{name}"
        for process in psutil.process_iter(["cmdline"]):
            if stepd in " ".join(process.info["cmdline"] or []):
                process.kill()

    def stop(self) -> None:
        """Stop all daemons and what they run."""
        self.run("scancel", "--state=RUNNING")
        self.run("scontrol", "shutdown")
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
