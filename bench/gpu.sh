#!/usr/bin/env bash
# Measure this suite on one GPU, in less than nine minutes: seconds an epoch by model, precision and
# CUDA graph, against targets and a plain script.
set -euo pipefail

usage() {
    cat <<'END'
usage: bench/gpu.sh [--only MODEL,...] [--budget SECONDS] [--loaders N,...] [--compile] [-o DIR]
       bench/gpu.sh --profile MODEL [-o DIR]
  --only MODEL,...   recipes to measure, in this order (default: the seven with a target)
  --budget SECONDS   for everything; arms that do not fit are named (default: 510)
  --loaders N,...    DataLoader workers of the plain script (default: 4,16)
  --compile          also torch.compile with a graph (minutes for deep networks)
  --profile MODEL    kernels of some steps, with and without graph, and the GPU's idle share
  -o DIR             folder for gpu.json, written after every arm (default: bench-results)
  -h                 this text
END
}

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
for argument in "$@"; do
    case $argument in
        -h | --help)
            usage
            exit 0
            ;;
    esac
done
python=$("$BASH" "$here/setup.sh" --which)
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m bench.gpu "$@"
