#!/usr/bin/env bash
# Measures the findings of the original competitor: trains every run of
# configs/findings.py, adds evaluations that need no training, and prints one table.
#
#   launch/findings.sh DATA RUNS [--dry-run]
#
# DATA: the prepared emoji dataset. RUNS: a folder for the workdirs.
# The most informative runs come first. Run the same command again to resume, also in
# the middle of a run. SEEDS="0 1 2" (the default) repeats the baseline with each seed.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 2 ]] || usage
data=$1 runs=$2 dry=${3:-}
[[ -z $dry || $dry == --dry-run ]] || usage
python=${PYTHON:-python}
cd "$(dirname "$0")/.."

jaxii() {
    echo "+ $python -m jaxii.main $*"
    [[ -n $dry ]] || "$python" -m jaxii.main "$@"
}

# train NAME WORKDIR [FLAG...]: does nothing if the run has been evaluated.
train() {
    local name=$1 workdir=$runs/$2
    shift 2
    [[ -e $workdir/metrics.json ]] ||
        jaxii --config="configs/findings.py:$name" --data_dir="$data" \
            --workdir="$workdir" "$@"
}

# evaluate WORKDIR RESULT FLAG...
evaluate() {
    local workdir=$runs/$1 result=$2
    shift 2
    [[ -e $workdir/$result ]] || jaxii evaluate --workdir="$workdir" "$@"
}

# adapt TRAINED OUTPUT FLAG...
adapt() {
    local workdir=$runs/$1 output=$runs/$2
    shift 2
    [[ -e $output/metrics.json ]] ||
        jaxii adapt --workdir="$workdir" --output="$output" --allow_tuning_labels "$@"
}

train baseline baseline
for name in long long_deep; do
    train "$name" "$name"
done
train no_augmentation no_augmentation
for name in bce_soft_f focal focal_from_zero bce_then_focal asl soft_f_fine_tune; do
    train "$name" "$name"
done

# Adaptation, from the weakest to the strongest.
evaluate baseline metrics_adabn.json --adapt_bn
evaluate baseline metrics_label_shift.json --label_shift
evaluate baseline metrics_tuned_on_tuning.json --tune_on=tuning --allow_tuning_labels
adapt baseline adapted_last_layer --train=last_layer
adapt baseline adapted_all --train=all

for name in embedding_1 embedding_0.1 embedding_dropped embedding_dim_8 \
    embedding_dim_128; do
    train "$name" "$name"
done
for name in resnet_26 resnet_26_d se_resnet_26 resnext_26; do
    train "$name" "$name"
done
for seed in ${SEEDS:-0 1 2}; do
    [[ $seed == 0 ]] || train baseline "baseline_seed_$seed" --config.seed="$seed"
done

# The table starts with the baseline, to which the other runs are compared.
rows=("$runs/baseline" "$runs"/baseline/metrics_*.json)
for workdir in "$runs"/*/; do
    [[ $workdir == "$runs/baseline/" || ! -e $workdir/metrics.json ]] ||
        rows+=("${workdir%/}")
done
jaxii compare "${rows[@]}" --output="$runs/findings.html"
