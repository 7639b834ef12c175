#!/usr/bin/env bash
# Trains on GPU nodes under Slurm: one process per node, with the commit that is checked
# out at submission. The job requeues itself as long as the run can continue.
#
#   launch/slurm.sh NODES JAXII_FLAGS [--dry-run]
#
#   SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=12:00:00 PYTHON=~/venv/bin/python \
#       launch/slurm.sh 4 --config=configs/f2_multitask.py:inclusive_images \
#       --data_dir=/shared/inclusive_images --workdir=/shared/runs/first
#
# Two minutes before the time limit, and when Slurm preempts the job, the processes get
# SIGTERM, save and exit with code 75, and the job requeues itself. After any other exit
# code (a lost process), it requeues itself RETRIES times; after exit code 2 (invalid
# input), it stops. Output: runs/slurm/JOB.out. `scancel JOB` stops the run, which has
# Slurm's KillWait (usually 30 s) to save; submit the same command to continue.
# Requirements: a file system shared by all nodes, with this checkout, the environment of
# PYTHON (`pip install '.[cuda]'`), the data and the workdir.
# The job gets whole nodes with all their CPUs and memory. With CPUS, it gets as many CPUs
# per node, the cluster's default memory for them, and other jobs can use the rest.
# Environment: GPUS per node [8]; CPUS per node [all]; PYTHON [python]; RETRIES [3];
# REVISIONS, a folder with one checkout per commit [~/.cache/jaxii/revisions]; and the
# variables of sbatch.
set -euo pipefail

# The job: sbatch runs a copy of this file, in the checkout of its commit.
if [[ -n ${JAXII_JOB_LOG:-} && -n ${SLURM_JOB_ID:-} ]]; then
    trap : TERM # only srun handles it; this shell still has to requeue the job
    source launch/commands.bash
    take_token # srun passes the environment to every process
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # an error if there is no GPU
    # srun reports the highest exit code, which may hide that one process exited with 2.
    export JAXII_MISUSED_FILE=$JAXII_JOB_LOG/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.misused
    code=0
    # srun does not take the CPUs per task from sbatch, and may bind a task to one CPU.
    srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        "${PYTHON:-python}" -m jaxii.main "$@" || code=$?
    [[ ! -e $JAXII_MISUSED_FILE ]] || code=2
    echo "slurm.sh: the run exited with code $code"
    lost=$JAXII_JOB_LOG/$SLURM_JOB_ID.lost
    case $code in
        0 | 2) exit "$code" ;;
        75) ;;
        *)
            echo "$code" >> "$lost"
            (($(wc -l < "$lost") <= ${RETRIES:-3})) || exit "$code"
            ;;
    esac
    # Slurm would also requeue a job after scancel, when its state is COMPLETING.
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r') || true
    case $state in
        RUNNING* | *TimeLimit) scontrol requeue "$SLURM_JOB_ID" ;;
        *) echo "slurm.sh: not requeued; state of the job: ${state:-unknown}" ;;
    esac
    exit "$code"
fi

cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${words[0]:-} =~ ^[1-9][0-9]*$ ]] || usage
nodes=${words[0]} flags=("${words[@]:1}")
check_places '^(/|gs://)' "is not the same path on every node; use an absolute path."
take_revision
checkout=${REVISIONS:-$HOME/.cache/jaxii/revisions}/$revision
log=$PWD/runs/slurm
[[ -e $checkout ]] || act git worktree add --quiet --detach "$checkout" "$revision"
act mkdir -p "$log"
cpus=(--exclusive --mem=0)
[[ -z ${CPUS:-} ]] || cpus=(--cpus-per-task="$CPUS")
act sbatch --job-name=jaxii --nodes="$nodes" --ntasks-per-node=1 \
    --gpus-per-node="${GPUS:-8}" "${cpus[@]}" --requeue --signal=TERM@120 \
    --open-mode=append --output="$log/%j.out" --chdir="$checkout" \
    --export="ALL,JAXII_JOB_LOG=$log" "$checkout/launch/slurm.sh" "${flags[@]}"
