#!/bin/bash
# A stage program as a job of Slurm. flows/launch_slurm.py fills in what stands between @ signs.
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
#SBATCH --chdir=@FOLDER@
#SBATCH --output=@LOG@
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --export=NONE
#SBATCH @OPTION@

# Nothing is exported by sbatch: what the program needs, secrets too, is in a file that only its
# owner can read, not in the controller's spool.
unset SLURM_EXPORT_ENV
# Slurm may start a job again that has ended well: where it was preempted once, or its node is lost.
if [ "$(cat @DONE@ 2>/dev/null)" = "$SLURM_JOB_ID" ]; then
    echo "job $SLURM_JOB_ID has ended well already: nothing to do"
    exit 0
fi
if [ ! -r @ENVIRONMENT@ ]; then
    echo "@ENVIRONMENT@ is gone, and credentials with it: run the flow again" | tee @ERROR@ >&2
    exit 2
fi
set -a
. @ENVIRONMENT@
set +a
# What stopped the run before is not what stops this one.
rm -f @ERROR@

# Two minutes before the end of its time only this script is told. The steps are told by scancel:
# srun itself would answer SIGTERM by killing them.
out_of_time=
end_in_time() {
    out_of_time=1
    # What is being cancelled is told by Slurm itself, and needs not be told twice.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
        scancel --signal=TERM "$SLURM_JOB_ID"
    fi
}
trap end_in_time TERM

# A partition may give a job that is preempted some time to end (GraceTime). The steps are told then,
# and one that leaves in that time is over for Slurm: it is requeued only by asking. Since 24.05 Slurm
# requeues it itself, where PreemptMode is not CANCEL, and once more after the good end of one that
# has asked: that start has nothing to do.
is_preempted() {
    scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | grep -q "PreemptTime=[0-9]"
}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Below 32768, from where on Linux gives ports to whoever connects to something. This script is on
# the first node, so that it can pass by a port at which something listens there.
port=$(@PYTHON@ -c '
import socket
import sys

for step in range(12000):
    port = 20000 + (int(sys.argv[1]) + step) % 12000
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break
' "$SLURM_JOB_ID")
# The log has what earlier starts of this job wrote as well.
written=$(($(stat --format=%s @LOG@ 2>/dev/null || echo 0) + 1))
# Torchrun would kill after 30 s what is still writing a checkpoint.
srun --export=ALL --kill-on-bad-exit=1 @CORES@ \
    @PYTHON@ -m flows.torchrun --nnodes=@NODES@ --nproc-per-node=@PROCESSES@ \
    --shutdown-timeout=@SHUTDOWN@ \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$port" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    -m @MODULE@ @JOB@ &
step=$!
wait "$step"
status=$?
if [ -n "$out_of_time" ]; then
    # The trap broke the first wait off.
    wait "$step"
    status=$?
fi
if [ "$status" -ne 0 ] && { [ -n "$out_of_time" ] || is_preempted; }; then
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    # A job that is being cancelled is told to end as well, and is not to come back.
    if [ "$state" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        # On a line of its own: the program has left words there without an end of line.
        echo "
Slurm did not requeue the job: run it again to go on" | tee -a @ERROR@ >&2
    fi
fi
# What is killed for its memory has no last words. Slurm has some, and no state of its own for a job
# whose step it was. What other ranks say then is what followed from it.
if [ "$status" -ne 0 ] && [ -z "$out_of_time" ] && tail --bytes=+"$written" @LOG@ |
    grep --quiet --extended-regexp "oom.kill event|Out Of Memory|xceeded (job )?memory limit"; then
    echo "it was killed because it used more memory than it may have: raise EQM_PROCESS_MEMORY, or \
lower processes or compute.micro_batch; run it again to go on" >@ERROR@
fi
# One that was preempted without such time comes back: it needs its environment.
if [ "$status" -eq 0 ]; then
    echo "$SLURM_JOB_ID" >@DONE@
    rm -f @ENVIRONMENT@
fi
exit "$status"
