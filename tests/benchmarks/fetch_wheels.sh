#!/usr/bin/env bash
# Fetches the wheels that on_gpu.sh installs where there is no network.
#
#   tests/benchmarks/fetch_wheels.sh FOLDER [PYTHON_VERSION]
#
# For Linux on x86-64 and Python 3.12, or PYTHON_VERSION. About 60 MB.
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
