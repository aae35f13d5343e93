"""sbatch, squeue, sacct, scancel, scontrol and srun for tests: this file under those names.

It starts what it is given, as processes of this machine, and obeys files that a test puts beside
its state (``hold``, ``reason``, ``down``, ``purge``, ``no-accounts``, ``no-requeue``,
``sbatch.says``, ``sbatch.away``, ``sbatch.lost``, ``version``, ``cancels``, ``ID.preempt``,
``ID.grace``, ``ID.timeout``, ``ID.again``).
What Slurm is known to do is done here too: a job starts with an environment of its own, the signal
of ``--signal=B:`` reaches the batch shell alone, a requeued job starts its script from the
beginning, a job that is ended from outside is COMPLETING until its processes are gone,
``--states=all`` shows jobs that have ended, and these are soon forgotten by the queue.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).absolute().parent
STATE = HERE / "state"
NAMES = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
FAILED = "sbatch: error: Batch job submission failed:"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def install(folder, first):
    """Put the commands into a folder for PATH. Jobs count from a number: their ports do too."""
    folder.mkdir()
    (folder / "state").mkdir()
    (folder / "state" / "first").write_text(str(first))
    text = f"#!{sys.executable}\n" + Path(__file__).read_text()
    for name in NAMES:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def read(number):
    return json.loads((STATE / f"{number}.json").read_text())


def write(number, **changes):
    file = STATE / f"{number}.json"
    job = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    if "state" in changes:
        job["states"] = [*job.get("states", []), changes["state"]]
    new = STATE / f"{number}.{os.getpid()}.new"
    new.write_text(json.dumps(job))
    new.replace(file)
    return job


def jobs():
    return sorted(int(f.stem) for f in STATE.glob("*.json"))


def options(words):
    return dict(word.removeprefix("--").partition("=")[::2] for word in words if word[:2] == "--")


def version():
    file = STATE / "version"
    return file.read_text() if file.exists() else "22.05.8"


def taken(number, kind):
    """Whether a test, or scontrol, asks for something; asked once."""
    file = STATE / f"{number}.{kind}"
    there = file.exists()
    file.unlink(missing_ok=True)
    return there


def refuse(message):
    sys.stderr.write(message + "\n")
    return 1


# -- the commands -------------------------------------------------------------------------------


def sbatch(words):
    assert words[0] == "--parsable", words
    script = Path(words[1]).read_text()
    given = options(re.findall(r"^#SBATCH (--\S+)$", script, re.MULTILINE))
    if given.get("partition") == "closed":
        return refuse("sbatch: error: invalid partition specified: closed")
    if (STATE / "sbatch.says").exists():
        return refuse(f"{FAILED} {(STATE / 'sbatch.says').read_text()}")
    if taken("sbatch", "away"):
        return refuse(f"{FAILED} Unable to contact slurm controller (connect failure)")
    number = max(jobs(), default=int((STATE / "first").read_text()) - 1) + 1
    write(
        number,
        state="PENDING",
        name=given["job-name"],
        options=given,
        script=script,
        restarts=0,
        graced=False,
    )
    with (STATE / "submissions").open("a") as file:
        file.write(words[1] + "\n")
    line = [sys.executable, __file__, "slurmd", str(number)]
    quiet = subprocess.DEVNULL
    subprocess.Popen(line, start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet)
    lost = STATE / "sbatch.lost"
    said = lost.read_text() if lost.exists() else ""
    if taken("sbatch", "lost"):
        return refuse(f"{FAILED} {said or 'Socket timed out on send/recv operation'}")
    sys.stdout.write(f"{number};a-cluster\n")
    return 0


def squeue(words):
    if (STATE / "down").exists():
        return refuse("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    given = options(words)
    if "jobs" in given:
        number = int(given["jobs"])
        gone = number not in jobs() or (
            (STATE / "purge").exists() and read(number)["state"] in ENDED
        )
        if gone:
            return refuse("slurm_load_jobs error: Invalid job id specified")
        if "states" not in given and read(number)["state"] in ENDED:
            return 0
        state, reason = read(number)["state"], "None"
        if state == "PENDING" and (STATE / "reason").exists():
            reason = (STATE / "reason").read_text()
        sys.stdout.write(f"{state} {reason}\n" if given["format"] == "%T %r" else f"{state}\n")
        return 0
    for number in jobs():
        job = read(number)
        seen = job["state"] not in ENDED or ("states" in given and not (STATE / "purge").exists())
        if job["name"] == given["name"] and seen:
            state = f" {job['state']}" if given["format"] == "%i %T" else ""
            sys.stdout.write(f"{number}{state}\n")
    return 0


def sacct(words):
    if (STATE / "no-accounts").exists():
        return refuse("Slurm accounting storage is disabled")
    state = read(int(options(words)["jobs"]))["state"]
    sys.stdout.write(f"{state} by 1000\n" if state == "CANCELLED" else f"{state}\n")
    return 0


def scancel(words):
    given = options(words)
    if "name" in given:
        numbers = [n for n in jobs() if read(n)["name"] == given["name"]]
    else:
        numbers = [int(words[-1])]
    for number in numbers:
        if given.get("signal"):
            tell(steps(number), signal.SIGTERM)
        elif read(number)["state"] not in ENDED:
            (STATE / f"{number}.cancel").touch()
    return 0


def scontrol(words):
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("\n".join(words[2].split(",")) + "\n")
        return 0
    if words == ["--version"]:
        sys.stdout.write(f"slurm-wlm {version()}\n")
        return 0
    if words[:3] == ["show", "job", "--oneliner"]:
        since = "2026-11-27T12:00:00" if read(int(words[3])).get("preempted") else "None"
        sys.stdout.write(
            f"JobId={words[3]} PreemptEligibleTime=Unknown PreemptTime={since} Power=\n"
        )
        return 0
    assert words[0] == "requeue", words
    if (STATE / "no-requeue").exists():
        return refuse("scontrol: error: Requested operation is presently disabled")
    (STATE / f"{words[1]}.requeue").touch()
    return 0


def srun(words):
    """One task a node, and the end of all with the first that fails."""
    number = os.environ["SLURM_JOB_ID"]
    ours = ("--export", "--kill", "--cpus")
    line = [word for word in words if not word.startswith(ours)]
    tasks = []
    for node in range(int(os.environ["SLURM_NNODES"])):
        environ = {**os.environ, "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(line, env=environ, start_new_session=True))
    new = STATE / f"{number}.newsteps"
    new.write_text(" ".join(str(task.pid) for task in tasks))
    new.replace(STATE / f"{number}.steps")

    def forces(*_):
        tell([task.pid for task in tasks], signal.SIGKILL)

    signal.signal(signal.SIGTERM, forces)
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            tell([task.pid for task in tasks if task.poll() is None], signal.SIGTERM)
        time.sleep(0.05)
    return max(abs(task.returncode) for task in tasks)


# -- the node -----------------------------------------------------------------------------------


def steps(number):
    file = STATE / f"{number}.steps"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def tell(pids, kind):
    for pid in pids:
        try:
            os.killpg(pid, kind)
        except ProcessLookupError:
            continue


def slurmd(number):
    """A job from its submission to its end."""
    while True:
        while (STATE / "hold").exists() and not (STATE / f"{number}.cancel").exists():
            time.sleep(0.05)
        if taken(number, "cancel"):
            return write(number, state="CANCELLED")
        end = once(number)
        # What has asked for it in its time of grace is put back once more: a bit is never cleared.
        graced = read(number)["graced"] and version() >= "24.05"
        if graced and (STATE / "cancels").exists():
            end = end if end == "REQUEUED" else "PREEMPTED"
        elif graced:
            write(number, graced=end == "REQUEUED")
            end = "REQUEUED"
        if taken(number, "again"):
            end = "REQUEUED"
        if end != "REQUEUED":
            return write(number, state=end)
        write(number, state="REQUEUED", restarts=read(number)["restarts"] + 1)
        time.sleep(0.3)
        write(number, state="PENDING")


def once(number):
    job = read(number)
    given = job["options"]
    spooled = STATE / f"{number}.batch"
    spooled.write_text(job["script"])
    environ = {
        "PATH": f"{HERE}:/usr/bin:/bin",
        "HOME": given["chdir"],
        "SLURM_JOB_ID": str(number),
        "SLURM_NNODES": given["nodes"],
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1"] * int(given["nodes"])),
        "SLURM_RESTART_COUNT": str(job["restarts"]),
        "SLURM_EXPORT_ENV": given["export"],
    }
    assert given["export"] == "NONE"
    mode = {"append": "a", "truncate": "w"}[given["open-mode"]]
    with Path(given["output"]).open(mode) as output:
        shell = subprocess.Popen(
            ["/bin/bash", str(spooled)],
            env=environ,
            cwd=given["chdir"],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        write(number, state="RUNNING", shell=shell.pid, preempted=False)
        ending = None
        while shell.poll() is None:
            ending = ending or asked(number, shell.pid, given)
            time.sleep(0.05)
    if taken(number, "requeue"):
        # Also of a job that is being cancelled: scontrol would do as it is told.
        ending = "REQUEUED"
    (STATE / f"{number}.steps").unlink(missing_ok=True)
    return ending or ("COMPLETED" if shell.returncode == 0 else "FAILED")


def asked(number, shell, given):
    """What ends a job from outside: its steps are told, and the shell goes when they have."""
    if taken(number, "timeout"):
        assert given["signal"].startswith("B:TERM@")
        os.kill(shell, signal.SIGTERM)
    if taken(number, "grace"):
        # Told, and given time to end before it is requeued: whoever ends then has ended.
        write(number, preempted=True, graced=True)
        tell(steps(number), signal.SIGTERM)
    for kind, state in (("cancel", "CANCELLED"), ("preempt", "REQUEUED"), ("lose", "NODE_FAIL")):
        if taken(number, kind):
            if kind != "lose":
                write(number, state="COMPLETING")
            if kind == "cancel":
                # The script is told as well; it must not requeue what is being cancelled.
                os.kill(shell, signal.SIGTERM)
            hard = signal.SIGKILL if kind == "lose" else signal.SIGTERM
            tell(steps(number), hard)
            return state
    return None


def main(argv):
    name = Path(argv[0]).name
    if len(argv) > 1 and argv[1] == "slurmd":
        slurmd(int(argv[2]))
        return 0
    return globals()[name](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
