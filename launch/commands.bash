# Functions shared by the scripts in this folder, which source this file: usage,
# --dry-run, printed commands, and the revision of the run.
# shellcheck shell=bash disable=SC2034,SC2154

usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "launch/$(basename "$0")"; exit 2; }
stop() { echo "$(basename "$0"): $2" >&2; exit "$1"; }

# Sets `words` to all arguments except --dry-run, and `dry` if that is given.
take() {
    local word
    dry='' words=()
    for word in "$@"; do
        if [[ $word == --dry-run ]]; then dry=yes; else words+=("$word"); fi
    done
}

# Prints words as a shell reads them, quoted only if necessary.
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

# Sets `revision` to the checked-out commit; stops if there are uncommitted changes.
take_revision() {
    revision=$(git rev-parse HEAD)
    [[ -z $(git status --porcelain) ]] ||
        stop 2 "the working tree has uncommitted changes; commit or stash them."
}

# check_places PATTERN WHY: stops unless --workdir is given and it and --data_dir match.
check_places() {
    local word last='' workdir=''
    for word in "${flags[@]}"; do
        [[ $last != --workdir && $last != --data_dir ]] || word=$last=$word
        [[ $word != --workdir=* ]] || workdir=$word
        [[ ! $word =~ ^--(workdir|data_dir)= || ${word#*=} =~ $1 ]] || stop 2 "$word $2"
        last=$word
    done
    [[ -n $workdir ]] ||
        stop 2 "--workdir is missing; a run is resumed from this folder."
}

# Appends --start_timeout_seconds=SECONDS to `flags` unless it is given.
allow_start() {
    [[ " ${flags[*]}" =~ \ --?start_timeout_seconds ]] ||
        flags+=("--start_timeout_seconds=$1")
}

# Exports JAXII_RUN_TOKEN, which admits a process to the run; random unless it is set.
take_token() {
    [[ -n ${JAXII_RUN_TOKEN:-} ]] ||
        JAXII_RUN_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    export JAXII_RUN_TOKEN
}
