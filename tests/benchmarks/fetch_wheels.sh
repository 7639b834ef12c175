#!/usr/bin/env bash
# Fetches the wheels that on_gpu.sh installs on a machine without a network: packages of
# jaxii that the machine lacks (see on_gpu.sh), and their dependencies. About 50 MB.
#
#   tests/benchmarks/fetch_wheels.sh FOLDER [PYTHON_VERSION]
#
# For Linux on x86-64 and Python 3.12, or PYTHON_VERSION. Environment: PYTHON [python3].
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
# polars 1.30 is older than jaxii supports, but enough for on_gpu.py, and smaller.
packages=(
    array_record charset-normalizer grain jaxtyping ml_collections polars==1.30.0
    simplejpeg tensorboardX tensorflow-datasets threadpoolctl xxhash
    # Dependencies of these, without pyarrow (50 MB), which is not used.
    attrs certifi cloudpickle dm-tree docstring_parser einops
    googleapis-common-protos idna immutabledict portpicker requests simple-parsing six
    tensorflow-metadata termcolor toml tqdm urllib3 wadler-lindig wrapt
)
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
python=${PYTHON:-python3}
"$python" -m pip download --quiet --no-deps --dest "$1" \
    --python-version "${2:-3.12}" --implementation cp --only-binary=:all: \
    "${platforms[@]}" --platform manylinux2014_x86_64 "${packages[@]}"
# Only its source is published, the same for all platforms.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$1" promise
