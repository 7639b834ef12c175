#!/usr/bin/env bash
# Trains on a preemptible Cloud TPU pod: a queued resource, with the same commit on every
# worker. After every preemption, the same command is restarted.
#
#   launch/tpu_pod.sh VERB NAME [JAXII_FLAGS] [--dry-run]
#
# create   requests the pod NAME and waits until it is ready
# setup    installs the commit that is checked out here on every worker
# run      starts `python -m jaxii.main JAXII_FLAGS` on every worker and watches it. After
#          exit code 75, it restarts the command; if the pod is preempted, on a new pod.
#          After a lost process, it restarts the command RETRIES times. After exit code 2
#          (invalid input), it stops. Ctrl-C stops watching, not the run. If a run of
#          another commit or with other flags is in progress, it fails
# resume   restores the pod, the installation and the run if missing, and watches again
# logs     follows the log of worker WORKER [0]
# status   prints the states of the request, the pod and the process of each worker
# stop     asks the run to save and exit, and waits until it has; resume continues it
# delete   deletes the pod; the workdir in the bucket remains
#
#   export ZONE=us-west4-a ACCELERATOR=v5litepod-16
#   launch/tpu_pod.sh create my-pod && launch/tpu_pod.sh setup my-pod
#   launch/tpu_pod.sh run my-pod --config=configs/f2_multitask.py:open_images_v4 \
#       --data_dir=gs://my-bucket/open_images --workdir=gs://my-bucket/runs/first
#
# Requirements: gcloud, logged in; a bucket that the pod can write to; a pushed commit.
# Environment: ZONE; PROJECT [that of gcloud]; ACCELERATOR [v5litepod-16]; RUNTIME, the
# TPU software version [v2-alpha-tpuv5-lite]; TIER [--spot; empty for on-demand];
# REPOSITORY that workers clone [URL of origin]; EXTRAS, more extras to install, such as
# wandb (then WANDB_* and MLFLOW_* are copied to the workers); RETRIES [3]; PREEMPTIONS,
# their limit [100]; POLL_SECONDS [30].
# Exit code: that of the run; also 1 if the pod or setup fails, 75 after stop or
# PREEMPTIONS.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${#words[@]} -ge 2 ]] || usage
verb=${words[0]} name=${words[1]} flags=("${words[@]:2}")
[[ -n ${ZONE:-} ]] ||
    stop 2 "ZONE is not set; use the zone of your TPUs, such as us-west4-a."
place=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)
workers=("${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all)
requested='' install='' start=yes preemptions=0 lost=0 silent=0 codes='' variables=''

# Queries are repeated, so only a dry run prints them (to a copy of stdout).
[[ -z $dry ]] || exec 3>&1
ask() { if [[ -n $dry ]]; then echo "+ $(quoted "$@")" >&3; else "$@"; fi; }

take_pushed_revision() {
    take_revision
    [[ -n $(git branch --remotes --contains "$revision") ]] ||
        stop 2 "commit ${revision:0:12} is on no remote branch; push it so workers can clone it."
    repository=${REPOSITORY:-$(git remote get-url origin)}
    [[ ${EXTRAS:-} =~ ^([a-z]+(,[a-z]+)*)?$ ]] ||
        stop 2 "EXTRAS=$EXTRAS is not a list of extras; use one such as wandb,mlflow."
    home=jaxii-${revision:0:12}${EXTRAS:+-$EXTRAS}
}

# Sets `now` to absent, waiting, ready, preempted, failed or unknown. It uses `list`,
# because an empty list is an answer, whereas `describe` may fail because of the network.
look() {
    local request node which=("${place[@]}" --filter="name~/$name\$")
    now=unknown
    request=$(ask "${tpus[@]}" queued-resources list "${which[@]}" \
        --format='value(state.state)') || return 0
    node=$(ask "${tpus[@]}" tpu-vm list "${which[@]}" --format='value(state)') || return 0
    [[ -z $dry ]] || request=ACTIVE node=READY
    [[ -z $dry || -n $requested || $verb == run ]] || request=''
    case $request/$node in
        ACTIVE/READY) now=ready ;;
        ACTIVE/ | ACTIVE/PREEMPTED | ACTIVE/TERMINATED | SUSPEND*) now=preempted ;;
        FAILED/*) now=failed ;;
        /*) now=absent ;;
        *) now=waiting ;;
    esac
}

request() {
    local tier=${TIER---spot}
    act "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${place[@]}" \
        --accelerator-type="${ACCELERATOR:-v5litepod-16}" \
        --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${tier:+"$tier"}
    requested=yes install=yes start=yes
}

give_back() {
    act "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet
}

# One folder per commit and EXTRAS, marked when complete, so that setup is not repeated.
setup() {
    act "${workers[@]}" --command="set -e; [ ! -e $home/.ready ] || exit 0; \
rm -rf $home; git clone --quiet $(quoted "$repository") $home; cd $home; \
git checkout --quiet --detach $revision; python3 -m pip install --quiet --user uv; \
uv=\$HOME/.local/bin/uv; \$uv venv --quiet --python 3.12; \
\$uv pip install --quiet --constraint .ci/lock.txt '.[tpu,gcs${EXTRAS:+,$EXTRAS}]'; \
touch .ready"
}

# Copies the variables of W&B and MLflow in a file, because command lines are public.
send_variables() {
    local key keys=("${!WANDB_@}" "${!MLFLOW_@}")
    [[ -n ${EXTRAS:-} && ${#keys[@]} -gt 0 ]] || return 0
    : "${variables:=$(mktemp)}"
    trap 'rm -f "$variables"' EXIT
    for key in "${keys[@]}"; do
        echo "export $key=$(quoted "${!key}")"
    done > "$variables"
    act "${tpus[@]}" tpu-vm scp "$variables" "$name:jaxii.env" "${place[@]}" --worker=all
}

# Starts the run on each worker, unless it is running there.
launch() {
    send_variables || return
    act "${workers[@]}" --command="\
[ ! -e jaxii.env ] || { . ./jaxii.env; rm jaxii.env; }; \
run=$(quoted "$(quoted "$home" "${flags[@]}")"); \
if kill -0 \$(cat jaxii.pid 2> /dev/null) 2> /dev/null; then \
[ \"\$run\" != \"\$(cat jaxii.run)\" ] || exit 0; \
echo \"another run is in progress: \$(cat jaxii.run)\" >&2; \
echo 'use launch/tpu_pod.sh stop $name to end it' >&2; exit 1; fi; \
[ -e $home/.ready ] || { echo 'commit ${revision:0:12} is not set up here\
${EXTRAS:+ with EXTRAS=$EXTRAS}' >&2; exit 1; }; cd $home; \
rm -f ~/jaxii.exit ~/jaxii.stopped; printf '%s\n' \"\$run\" > ~/jaxii.run; \
export JAX_PLATFORMS=tpu,cpu; export JAXII_RUN_TOKEN=$(quoted "$JAXII_RUN_TOKEN"); \
trap '' HUP; sh -c '\"\$@\"; echo \$? > ~/jaxii.exit' sh .venv/bin/python -m jaxii.main \
$(quoted "${flags[@]}") < /dev/null >> ~/jaxii.log 2>&1 & echo \$! > ~/jaxii.pid"
}

processes() {
    ask "${workers[@]}" --command="echo jaxii-process \$(if kill -0 \$(cat jaxii.pid); \
then echo running; else cat jaxii.exit || echo lost; \
[ ! -e jaxii.stopped ] || echo stopped; fi 2> /dev/null)"
}

# Sets `codes` to the different states of the processes, such as "0 running".
listen() {
    codes=$(processes) || { no_answer; return 1; }
    codes=$(sed -n 's/^jaxii-process //p' <<< "$codes" | sort -u | xargs)
    silent=0
}

# Sends SIGTERM to the program, not to the shell that writes its exit code.
end_run() {
    act "${workers[@]}" --command="pid=\$(cat jaxii.pid 2> /dev/null); \
! kill -0 \$pid 2> /dev/null || { touch jaxii.stopped; pkill -TERM -P \$pid || true; }"
    until listen && [[ $codes != *running* ]]; do sleep "${POLL_SECONDS:-30}"; done
    [[ -n $dry ]] || echo "$name: the run has ended ($codes)"
}

# A failure on a pod that still exists is an error; otherwise the pod was preempted.
or_preempted() {
    look
    [[ $now != ready ]] || stop 1 "$1 failed on a worker of $name; see its message above."
}

preempted() {
    ((++preemptions <= ${PREEMPTIONS:-100})) ||
        stop 75 "$1 too often; use resume to continue."
    echo "$1; restarting the same command ($preemptions)"
}

no_answer() {
    ((++silent <= 10)) || stop 1 "$name does not respond; use status, then resume."
}

# Takes the next step on a pod that is ready; succeeds when the run is complete.
advance() {
    if [[ -n $install ]]; then setup || { or_preempted setup; return 1; }; fi
    install=''
    if [[ -n $start ]]; then launch || { or_preempted "the start"; return 1; }; fi
    start=''
    listen || return 1
    [[ -z $dry ]] || return 0
    case " $codes " in
        *' 2 '*) stop 2 "the run exited with code 2 (invalid input); see logs." ;;
        *running*) return 1 ;;
        ' 0 ' | ' 0 stopped ') return 0 ;;
        *stopped*) stop 75 "the run was stopped; use resume to continue it." ;;
        ' 75 ' | ' 0 75 ') preempted "the run was stopped on request (75)" ;;
        *)
            ((++lost <= ${RETRIES:-3})) || stop 1 "a process was lost ($codes); see logs."
            echo "a process was lost ($codes); restarting the same command"
            ;;
    esac
    start=yes
    return 1
}

# reach ready|end: takes steps until the pod is ready, or until the run has ended.
reach() {
    local said=''
    trap 'stop 130 \
        "stopped watching; pod and run continue: status, resume, stop, delete."' INT
    while look; do
        [[ $now == "$said" || -n $dry ]] || echo "$name: $now"
        said=$now
        case $now in
            absent)
                [[ $verb != run && -z $requested ]] ||
                    stop 1 "pod $name does not exist; create it."
                request
                ;;
            preempted)
                preempted "$name was preempted"
                give_back
                request
                ;;
            failed) stop 1 "the request for $name failed; see status, then delete it." ;;
            waiting) silent=0 ;;
            unknown) no_answer ;;
            ready) if [[ $1 == ready ]] || advance; then return; fi ;;
        esac
        [[ -n $dry ]] || sleep "${POLL_SECONDS:-30}"
    done
}

case $verb in
    create) reach ready ;;
    setup | run | resume)
        if [[ $verb != setup ]]; then
            check_places '^gs://' \
                "is not in a bucket; a pod's disks are deleted with it, so use gs://."
            # gcloud may need minutes to connect to a worker when others have started.
            allow_start 300
        fi
        take_pushed_revision
        take_token
        [[ $verb == run ]] || install=yes
        if [[ $verb != setup ]]; then reach end
        else setup || stop 1 "setup failed on a worker of $name; its message is above."; fi
        ;;
    logs)
        act "${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker="${WORKER:-0}" \
            --command='tail -n 100 -F jaxii.log'
        ;;
    status)
        act "${tpus[@]}" queued-resources describe "$name" "${place[@]}"
        processes
        ;;
    stop) end_run ;;
    delete) give_back ;;
    *) usage ;;
esac
