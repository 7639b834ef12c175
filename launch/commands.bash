# What the scripts beside this file share: usage, --dry-run, commands that are printed,
# and the one revision that a run is made of. They source it; it does nothing by itself.
# shellcheck shell=bash disable=SC2034,SC2154

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2; }
stop() { echo "$(basename "$0"): $2" >&2; exit "$1"; }

# Sets `words` to what was given but --dry-run, and `dry`.
take() {
    local word
    dry='' words=()
    for word in "$@"; do
        if [[ $word == --dry-run ]]; then dry=yes; else words+=("$word"); fi
    done
}

# Words as a shell reads them, with quotes only where they are needed.
quoted() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
        line+=" $word"
    done
    echo "${line# }"
}

act() {
    local line
    line=$(quoted "$@")
    echo "+ ${line//"${JAXII_RUN_TOKEN:-}"/TOKEN}" # logs are not for secrets
    [[ -n $dry ]] || "$@"
}

# Sets `revision` to the commit that is checked out, if it is all there is.
take_revision() {
    revision=$(git rev-parse HEAD)
    [[ -z $(git status --porcelain) ]] ||
        stop 2 "the tree has changes that are in no commit; commit or stash them."
}

# check_places PATTERN WHY: --workdir is given and, like --data_dir, matches.
check_places() {
    local word last='' workdir=''
    for word in "${flags[@]}"; do
        [[ $last != --workdir && $last != --data_dir ]] || word=$last=$word
        [[ $word != --workdir=* ]] || workdir=$word
        [[ ! $word =~ ^--(workdir|data_dir)= || ${word#*=} =~ $1 ]] || stop 2 "$word $2"
        last=$word
    done
    [[ -n $workdir ]] || stop 2 "--workdir is missing: a run goes on from what lies there."
}

# Exports JAXII_RUN_TOKEN, random unless it is given: who knows it belongs to the run.
take_token() {
    [[ -n ${JAXII_RUN_TOKEN:-} ]] ||
        JAXII_RUN_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export JAXII_RUN_TOKEN
}
