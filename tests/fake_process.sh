#!/usr/bin/env bash
# A `python` that is one process of a run, for the tests of launch/rehearse.sh and slurm.sh.
#
# Word I of $OUTCOMES is the outcome of process I: an exit code; `waiting`, if it ends
# with 75 on SIGTERM or SIGINT; or `stubborn`, if neither ends it. Each prints its
# settings and arguments.
for word in "$@"; do
    [[ $word != --process_id=* ]] || me=${word#*=}
done
echo "given $JAX_PLATFORMS ${XLA_FLAGS:-} $*"
read -ra outcomes <<< "${OUTCOMES:?}"
case ${outcomes[me]} in
    waiting | stubborn)
        count=0
        trap 'count=$((count + 1)); echo "signal $count"' TERM INT
        echo waits
        while ((count == 0)) || [[ ${outcomes[me]} == stubborn ]]; do sleep 0.1; done
        sleep 0.3 # a second signal would show
        exit 75
        ;;
    *) exit "${outcomes[me]}" ;;
esac
