"""A Slurm of two nodes on this machine: munged, slurmctld, and a slurmd in each network namespace.

Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge (or others that put the
same programs on PATH). Nodes have names and addresses of their own, so that ranks meet through the
network as on a cluster. Commands of Slurm run on the first node: ``bin`` for PATH.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

from machines import ADDRESSES, Machines

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun", "sinfo")
PATHS = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ("n1", "n2")

CONF = """
ClusterName=two
SlurmctldHost=n1({first})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=30
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,requeue_delay=1
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{more}
NodeName=n1 NodeAddr={first} CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeAddr={second} CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=long Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=NO PriorityTier=1 {grace}
PartitionName=short Nodes=n1,n2 MaxTime=5 PriorityTier=1
PartitionName=one Nodes=n1 MaxTime=INFINITE PriorityTier=1
PartitionName=first Nodes=n1,n2 MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there is none here."""
    lacking = [name for name in (*PROGRAMS, *COMMANDS) if shutil.which(name, path=PATHS) is None]
    if lacking:
        return f"{', '.join(lacking)} are not here: install Slurm and munge"
    return None if os.geteuid() == 0 else "a Slurm of one's own is for root"


def network(pid: int) -> str:
    """Namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/net")


class RealSlurm:
    """Started by ``with``; its state is in a folder."""

    def __init__(self, folder: Path, *, grace_seconds: int = 0, more: str = "") -> None:
        self.folder = folder
        self.grace = f"GraceTime={grace_seconds}" if grace_seconds else ""
        self.more = more
        self.machines = Machines()
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def __enter__(self) -> "RealSlurm":
        self.machines.__enter__()
        try:
            self._write()
            self._start("munged")
            self.controller()
            for number in range(2):
                self.node(number)
            self.wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, name in enumerate(NODES):
            if name in self.children:
                self.power_off(number)
        for name in reversed(list(self.children)):
            self.kill(name)
        self.machines.__exit__()

    def _write(self) -> None:
        for name in ("state", "bin", "munge"):
            (self.folder / name).mkdir(parents=True)
        os.chmod(self.folder / "munge", 0o700)
        self.conf.write_text(
            CONF.format(
                first=ADDRESSES[0],
                second=ADDRESSES[1],
                folder=self.folder,
                grace=self.grace,
                more=self.more,
            )
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # GPUs to be counted; there is nothing behind them.
        (self.folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/loop[0-1]\n")
        pairs = zip(ADDRESSES, NODES, strict=True)
        names = "".join(f"{address} {name}\n" for address, name in pairs)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        key = self.folder / "munge.key"
        subprocess.run(["mungekey", "--create", f"--keyfile={key}"], check=True, env=self._env())
        for name in COMMANDS:
            line = shlex.join([*self._on(0), str(shutil.which(name, path=PATHS))])
            text = f'#!/bin/sh\nexport SLURM_CONF={self.conf}\nexec {line} "$@"\n'
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def _on(self, number: int) -> list[str]:
        """What to put before a command line, so that it runs on a node."""
        hosts = shlex.quote(str(self.folder / "hosts"))
        setup = f'hostname {NODES[number]} && mount --bind {hosts} /etc/hosts && exec "$@"'
        own = ["unshare", "--mount", "--uts", "sh", "-c", setup, "sh"]
        return [*self.machines.within(number), *own]

    def _env(self) -> dict[str, str]:
        return {"PATH": PATHS, "SLURM_CONF": str(self.conf), "LANG": "C.UTF-8"}

    def _start(self, name: str, number: int = 0) -> None:
        folder = self.folder
        line = {
            "munged": [
                "munged",
                "--foreground",
                "--force",
                f"--key-file={folder}/munge.key",
                f"--socket={folder}/munge.socket",
                f"--pid-file={folder}/munge/pid",
                f"--log-file={folder}/munge/log",
                f"--seed-file={folder}/munge/seed",
            ],
            "slurmctld": [*self._on(0), "slurmctld", "-D", "-f", str(self.conf)],
        }.get(name, [*self._on(number), "slurmd", "-D", "-f", str(self.conf), "-N", name])
        with (folder / f"{name}.out").open("ab") as out:
            self.children[name] = subprocess.Popen(
                line, env=self._env(), stdout=out, stderr=out, start_new_session=True
            )

    def controller(self) -> None:
        self._start("slurmctld")

    def node(self, number: int) -> None:
        self._start(NODES[number], number)

    def kill(self, name: str) -> None:
        """End a daemon with -9; the jobs of a node go on, as they do where its slurmd has died."""
        child = self.children.pop(name)
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def power_off(self, number: int) -> None:
        """End all that runs on a node, but for what is there for both."""
        self.kill(NODES[number])
        holder = self.machines.holders[number].pid
        kept = {os.getpgid(child.pid) for child in self.children.values()} | {os.getpgid(holder)}
        # Whoever watches steps must not live to tell how they ended.
        for name in ("slurmstepd", ""):
            for process in Path("/proc").glob("[1-9]*"):
                with contextlib.suppress(OSError):
                    pid = int(process.name)
                    here = network(pid) == network(holder) and os.getpgid(pid) not in kept
                    if here and name in (process / "cmdline").read_text("utf-8", "replace"):
                        os.kill(pid, signal.SIGKILL)

    def ask(self, name: str, *words: str) -> str:
        """What a command says. Raises CalledProcessError."""
        told = subprocess.run(
            [str(self.bin / name), *words], capture_output=True, text=True, check=True
        )
        return told.stdout

    def wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 60
        said = ""
        while time.monotonic() < deadline:
            try:
                said = self.ask("sinfo", "--noheader", "--partition=long", "--format=%t")
            except subprocess.CalledProcessError as error:
                said = error.stderr
            if said.split() == ["idle"]:
                return
            time.sleep(0.5)
        raise OSError(f"Slurm does not start: {said}; see {self.folder}/*.log and *.out")
