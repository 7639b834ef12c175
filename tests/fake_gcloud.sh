#!/usr/bin/env bash
# A fake `gcloud` with one pod of two workers, for the tests of launch/tpu_pod.sh.
#
# $FAKE/request and $FAKE/node hold the states that Google would report; worker0 and
# worker1 are the workers' home folders. A command for a worker runs in its home, with a
# `python3` and a `uv` that install a `python` which only counts its runs and ends as
# specified. Line N of $FAKE/outcomes has one word per worker, the outcome of run N: an
# exit code; `preempted`, if the pod is preempted during the run; `running`, if it does
# not end. If $FAKE/broken.workerI exists, the setup of worker I fails. Every call is a
# line of $FAKE/calls.
set -euo pipefail
echo "$*" >> "$FAKE/calls"

# The programs of a worker; the home says which worker it is.
if [[ ${1:-} == become_a_worker ]]; then
    mkdir -p "$2/bin" "$2/.local/bin"
    ln -s /bin/true "$2/bin/python3"
    cat > "$2/.local/bin/uv" <<'UV'
#!/usr/bin/env bash
if [[ $1 == pip ]]; then
    echo "$*" > installed
    [[ ! -e $FAKE/broken.${HOME##*/} ]] || { echo "No space left on device" >&2; exit 28; }
    exit
fi
mkdir -p .venv/bin
cat > .venv/bin/python <<'PYTHON'
#!/usr/bin/env bash
worker=${HOME##*/}
echo "$JAX_PLATFORMS $*" >> "$FAKE/runs.$worker"
echo "$JAXII_RUN_TOKEN" >> "$FAKE/tokens.$worker"
echo "${WANDB_API_KEY:-none} ${MLFLOW_TRACKING_URI:-none}" >> "$FAKE/services.$worker"
mapfile -t runs < "$FAKE/runs.$worker"
mapfile -t outcomes < "$FAKE/outcomes"
read -ra outcome <<< "${outcomes[${#runs[@]} - 1]}"
case ${outcome[${worker#worker}]} in
    preempted) echo SUSPENDED > "$FAKE/request"; echo PREEMPTED > "$FAKE/node"; exit 143 ;;
    running) exec sleep 60 ;;
    *) echo "this is the log of $worker"; exit "${outcome[${worker#worker}]}" ;;
esac
PYTHON
chmod +x .venv/bin/python
UV
    chmod +x "$2/.local/bin/uv"
    exit
fi

case "$1 $2 $3 $4" in
    "compute tpus queued-resources create")
        [[ ! -e $FAKE/request ]] || { echo "ERROR: it exists already" >&2; exit 1; }
        echo WAITING_FOR_RESOURCES > "$FAKE/request"
        for worker in worker0 worker1; do
            rm -rf "${FAKE:?}/$worker"
            "$0" become_a_worker "$FAKE/$worker"
        done
        ;;
    "compute tpus queued-resources list")
        [[ -e $FAKE/request ]] || exit 0
        now=$(< "$FAKE/request")
        echo "$now"
        if [[ $now == WAITING_FOR_RESOURCES ]]; then
            if [[ -e $FAKE/refuse ]]; then now=FAILED; else now=ACTIVE; fi
            echo "$now" > "$FAKE/request"
            echo READY > "$FAKE/node"
        fi
        ;;
    "compute tpus queued-resources describe") echo "state: $(< "$FAKE/request")" ;;
    "compute tpus queued-resources delete") rm -f "$FAKE/request" "$FAKE/node" ;;
    "compute tpus tpu-vm list") [[ ! -e $FAKE/node ]] || cat "$FAKE/node" ;;
    "compute tpus tpu-vm scp")
        for worker in worker0 worker1; do cp "$5" "$FAKE/$worker/${6#*:}"; done
        stat --format=%a "$5" >> "$FAKE/modes"
        ;;
    "compute tpus tpu-vm ssh")
        [[ $(< "$FAKE/node") == READY ]] || { echo "ERROR: no route to host" >&2; exit 255; }
        patience=60
        for word in "$@"; do
            case $word in
                --worker=all) workers=(worker0 worker1) ;;
                # A person, who stops watching after a second.
                --worker=*) workers=("worker${word#*=}") patience=1 ;;
                --command=*) command=${word#*=} ;;
            esac
        done
        failed=0
        for worker in "${workers[@]}"; do
            home=$FAKE/$worker
            (cd "$home" && exec env -i HOME="$home" FAKE="$FAKE" \
                PATH="$home/bin:/usr/bin:/bin" setsid --wait timeout "$patience" bash -c "$command") || failed=$?
        done
        exit "$failed"
        ;;
    *) echo "ERROR: $* is not known" >&2; exit 2 ;;
esac
