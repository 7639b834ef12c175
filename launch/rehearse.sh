#!/usr/bin/env bash
# Rehearses a run of several hosts on this machine: N processes on the CPU, connected over
# loopback as they would be in a pod.
#
#   launch/rehearse.sh N [JAXII_FLAGS] [--dry-run]
#
#   launch/rehearse.sh 4
#   DEVICES=2 launch/rehearse.sh 4 --config=configs/f2_multitask.py:emoji \
#       --data_dir=data/emoji --workdir=runs/rehearsed
#
# Without flags, it runs the default recipe. Process 0 prints here, every other process I
# to LOGS/I.log. SIGTERM and Ctrl-C are passed on to all processes, which save and exit
# with code 75.
# Environment: DEVICES per process [1]; LOGS [runs/rehearsal]; PORT of process 0 [a free
# port]; GRACE_SECONDS before the others are killed after a failure [90]; PYTHON [python].
# Exit code: 0 or 75 if all processes exit with it, else that of the first failed process.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/commands.bash
take "$@"
[[ ${words[0]:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=${words[0]} flags=("${words[@]:1}")
[[ ${#flags[@]} -gt 0 ]] || flags=(--config=configs/f2_multitask.py)
logs=${LOGS:-runs/rehearsal} grace=${GRACE_SECONDS:-90} port=${PORT:-}
xla=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${DEVICES:-1}
until [[ -n $port ]]; do
    # Below the range from which the system assigns ports.
    port=$((20000 + RANDOM % 10000))
    if (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then port=''; fi
done

take_token
[[ -n $dry ]] || mkdir -p "$logs"
pids=() running=()
# send SIGNAL [-]: to the processes that have not ended, or to their groups.
send() {
    local i
    for i in "${running[@]}"; do
        kill -s "$1" -- "${2:-}${pids[i]}" 2> /dev/null || true
    done
}
trap 'send TERM' TERM
trap 'send INT' INT

# Each process has its own group, so Ctrl-C reaches it once, passed on by this script.
set -m
for ((i = 0; i < processes; i++)); do
    process=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$xla" "${PYTHON:-python}" -m jaxii.main
        "${flags[@]}" --coordinator="127.0.0.1:$port" --num_processes="$processes"
        --process_id="$i")
    to=''
    ((i == 0)) || to=" > $(quoted "$logs/$i.log") 2>&1"
    echo "+ $(quoted "${process[@]}")$to &"
    [[ -z $dry ]] || continue
    if ((i == 0)); then
        "${process[@]}" < /dev/null &
    else
        "${process[@]}" < /dev/null > "$logs/$i.log" 2>&1 &
    fi
    pids+=($!) running+=("$i")
done
set +m
[[ -z $dry ]] || exit 0

codes=() failed='' until=0
while ((${#running[@]})); do
    sleep 0.2 || true # Ctrl-C also interrupts it
    for i in "${!running[@]}"; do
        ! kill -0 "${pids[i]}" 2> /dev/null || continue
        code=0
        wait "${pids[i]}" || code=$?
        echo "rehearse.sh: process $i exited with code $code" >&2
        unset "running[$i]"
        codes+=("$code")
        [[ $code == 0 || $code == 75 || -n $failed ]] ||
            failed=$code until=$((SECONDS + grace))
    done
    # Whole groups, so that no worker process is left behind.
    [[ -z $failed ]] || ((SECONDS < until)) || send KILL -
done
case $(printf '%s\n' "${codes[@]}" | sort -u | xargs) in
    0) exit 0 ;;
    75) exit 75 ;;
    *) exit "${failed:-1}" ;;
esac
