#!/usr/bin/env bash
# Trains on a Cloud TPU pod that may be taken away: a queued resource, one commit on
# every worker, and the same command again after every preemption.
#
#   launch/tpu_pod.sh VERB NAME [FLAGS OF JAXII] [--dry-run]
#
# create   asks for the pod NAME and waits until it is there
# setup    installs the commit that is checked out here on every worker
# run      starts `python -m jaxii.main FLAGS` on every worker and watches. Preempted (75,
#          or no pod left): a new pod, the same command. A process lost (1): the same
#          command, RETRIES times. Misuse (2): stops. Ctrl-C stops watching, not the run
# resume   brings back what is missing of pod, installation and run, and watches again
# logs     follows the log of worker WORKER [0]
# status   the states of request, pod and each worker's process
# delete   gives the pod back; everything of value is in the bucket
#
#   export ZONE=us-west4-a ACCELERATOR=v5litepod-16
#   launch/tpu_pod.sh create my-pod && launch/tpu_pod.sh setup my-pod
#   launch/tpu_pod.sh run my-pod --config=configs/f2_multitask.py:open_images_v4 \
#       --data_dir=gs://my-bucket/open_images --workdir=gs://my-bucket/runs/first
#
# Needed: gcloud, logged in; a bucket that the pod may write; the commit pushed.
# Environment: ZONE; PROJECT [gcloud's]; ACCELERATOR [v5litepod-16]; RUNTIME, its image
# [v2-alpha-tpuv5-lite]; TIER [--spot; nothing is on demand]; REPOSITORY that workers
# clone [origin's URL]; RETRIES [3]; PREEMPTIONS, how many [100]; POLL_SECONDS [30].
# Exit: that of the run; 1 too if pod or setup fail; 75 after PREEMPTIONS.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${#words[@]} -ge 2 ]] || usage
verb=${words[0]} name=${words[1]} flags=("${words[@]:2}")
[[ -n ${ZONE:-} ]] || stop 2 "ZONE is not set; give the zone of your TPUs, ZONE=us-west4-a."
place=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)
workers=("${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=all)
requested='' install='' start=yes preemptions=0 lost=0 silent=0

# Questions are asked again and again: only a dry run prints them, past who reads answers.
[[ -z $dry ]] || exec 3>&1
ask() { if [[ -n $dry ]]; then echo "+ $(quoted "$@")" >&3; else "$@"; fi; }

take_pushed_revision() {
    take_revision
    [[ -n $(git branch --remotes --contains "$revision") ]] ||
        stop 2 "commit ${revision:0:12} is on no remote branch; push it: workers clone it."
    repository=${REPOSITORY:-$(git remote get-url origin)}
    home=jaxii-${revision:0:12}
}

# Sets `now` to absent, waiting, ready, preempted, failed or unknown. Lists, because an
# empty list is an answer, and a description that fails may be the network's fault.
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

# A folder a commit, and a mark when it is complete: there is nothing to do twice.
setup() {
    act "${workers[@]}" --command="set -e; [ ! -e $home/.ready ] || exit 0; \
rm -rf $home; git clone --quiet $(quoted "$repository") $home; cd $home; \
git checkout --quiet --detach $revision; python3 -m pip install --quiet --user uv; \
uv=\$HOME/.local/bin/uv; \$uv venv --quiet --python 3.12; \
\$uv pip install --quiet --constraint .ci/lock.txt '.[tpu,gcs]'; touch .ready"
}

launch() {
    act "${workers[@]}" --command="[ -e $home/.ready ] || \
{ echo 'commit ${revision:0:12} is not set up here' >&2; exit 1; }; cd $home; \
! kill -0 \$(cat ~/jaxii.pid 2> /dev/null) 2> /dev/null || exit 0; \
rm -f ~/jaxii.exit; export JAX_PLATFORMS=tpu,cpu; \
export JAXII_RUN_TOKEN=$(quoted "$JAXII_RUN_TOKEN"); trap '' HUP; \
sh -c '\"\$@\"; echo \$? > ~/jaxii.exit' sh .venv/bin/python -m jaxii.main \
$(quoted "${flags[@]}") < /dev/null >> ~/jaxii.log 2>&1 & echo \$! > ~/jaxii.pid"
}

processes() {
    ask "${workers[@]}" --command="echo jaxii-process \$(if kill -0 \$(cat jaxii.pid); \
then echo running; else cat jaxii.exit || echo lost; fi 2> /dev/null)"
}

# What failed on a pod that is still there is an error; else the pod was preempted.
or_preempted() {
    look
    [[ $now != ready ]] || stop 1 "$1 failed on a worker of $name; see above."
}

preempted() {
    ((++preemptions <= ${PREEMPTIONS:-100})) || stop 75 "$1 once too often; resume goes on."
    echo "$1; the same command again ($preemptions)"
}

no_answer() {
    ((++silent <= 10)) || stop 1 "$name does not answer; see status, then resume."
}

# The next thing to do on a pod that is there; true when the run has ended well.
advance() {
    local codes
    if [[ -n $install ]]; then setup || { or_preempted setup; return 1; }; fi
    install=''
    if [[ -n $start ]]; then launch || { or_preempted "the start"; return 1; }; fi
    start=''
    codes=$(processes) || { no_answer; return 1; }
    [[ -z $dry ]] || return 0
    codes=$(sed -n 's/^jaxii-process //p' <<< "$codes" | sort -u | xargs)
    silent=0
    case " $codes " in
        *' 2 '*) stop 2 "the run cannot work as it was given (2); see logs." ;;
        *running*) return 1 ;;
        ' 0 ') return 0 ;;
        ' 75 ' | ' 0 75 ') preempted "the run was asked to stop (75)" ;;
        *)
            ((++lost <= ${RETRIES:-3})) || stop 1 "a process was lost ($codes); see logs."
            echo "a process was lost ($codes); the same command again"
            ;;
    esac
    start=yes
    return 1
}

# reach ready|end: looks, and does what is next, until the pod is or the run has.
reach() {
    local said=''
    trap 'stop 130 "no longer watching; pod and run go on: status, resume, delete."' INT
    while look; do
        [[ $now == "$said" || -n $dry ]] || echo "$name: $now"
        said=$now
        case $now in
            absent)
                [[ $verb != run && -z $requested ]] || stop 1 "no pod $name; create it."
                request
                ;;
            preempted)
                preempted "$name was preempted"
                give_back
                request
                ;;
            failed) stop 1 "the request for $name failed; status says why. Delete it." ;;
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
            check_places '^gs://' "is not in a bucket; a pod's disks go with it: use gs://."
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
    delete) give_back ;;
    *) usage ;;
esac
