#!/usr/bin/env bash
# Trains on GPU nodes under Slurm: one process a node, the commit that was checked out at
# submission, and back into the queue whenever the run can go on.
#
#   launch/slurm.sh NODES FLAGS OF JAXII [--dry-run]
#
#   SBATCH_PARTITION=gpu SBATCH_TIMELIMIT=12:00:00 PYTHON=~/venv/bin/python \
#       launch/slurm.sh 4 --config=configs/f2_multitask.py:inclusive_images \
#       --data_dir=/shared/inclusive_images --workdir=/shared/runs/first
#
# Two minutes before the time limit, and when Slurm takes the nodes, the processes get
# SIGTERM, save and end with 75: the job queues itself again. After 1, a process lost, too,
# RETRIES times; after 2, misuse, it stops. Output: runs/slurm/JOB.out.
# Needed: a file system that all nodes share, with this checkout, PYTHON's environment
# (`pip install '.[cuda]'`), data and workdir on it.
# Environment: GPUS a node [8]; PYTHON [python]; RETRIES [3]; REVISIONS, a folder of
# checkouts, one a commit [~/.cache/jaxii/revisions]; and what sbatch itself reads.
set -euo pipefail

# The job: sbatch runs a copy of this file, in the checkout of its commit.
if [[ -n ${JAXII_JOB_LOG:-} && -n ${SLURM_JOB_ID:-} ]]; then
    trap : TERM # for srun alone; this shell has yet to queue the job again
    source launch/commands.bash
    take_token # srun hands the environment to every process
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # an error where there is no GPU
    code=0
    srun --kill-on-bad-exit=0 --wait=0 "${PYTHON:-python}" -m jaxii.main "$@" || code=$?
    echo "slurm.sh: the run ended with $code"
    lost=$JAXII_JOB_LOG/$SLURM_JOB_ID.lost
    case $code in
        0 | 2) exit "$code" ;;
        75) ;;
        *)
            echo "$code" >> "$lost"
            (($(wc -l < "$lost") <= ${RETRIES:-3})) || exit "$code"
            ;;
    esac
    scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
fi

cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${words[0]:-} =~ ^[1-9][0-9]*$ ]] || usage
nodes=${words[0]} flags=("${words[@]:1}")
check_places '^(/|gs://)' "is not the same place on every node; give an absolute path."
take_revision
checkout=${REVISIONS:-$HOME/.cache/jaxii/revisions}/$revision
log=$PWD/runs/slurm
[[ -e $checkout ]] || act git worktree add --quiet --detach "$checkout" "$revision"
act mkdir -p "$log"
act sbatch --job-name=jaxii --nodes="$nodes" --ntasks-per-node=1 \
    --gpus-per-node="${GPUS:-8}" --requeue --signal=TERM@120 --open-mode=append \
    --output="$log/%j.out" --chdir="$checkout" --export="ALL,JAXII_JOB_LOG=$log" \
    "$checkout/launch/slurm.sh" "${flags[@]}"
