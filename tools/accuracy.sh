#!/usr/bin/env bash
# Train whole recipes, cheapest first, within a time budget; the next call goes on where this one
# has stopped.
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/accuracy.sh [-d DATASET] [-o FOLDER] [--budget SECONDS] RECIPE... [-- FLAGS]
  -d DATASET         as of launcher.sh (default: cifar10)
  -o FOLDER          of the runs: FOLDER/DATASET/RECIPE (default: checkpoints)
  --budget SECONDS   stop in time for the last save (default: none)
  FLAGS              for cifar.py, such as --amp bf16 --data DIR
exit code: 0 all are trained to their end, 75 something is left: run me again, else that of the run
that has failed
END
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

again=75  # The exit code of a run that was told to end and can go on.
stopped=143
margin=15 # The seconds that the last save may take.
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
dataset=cifar10 output=checkpoints budget='' recipes=() flags=() pid=''

parse_options() {
    while (($#)); do
        case $1 in
            -d | -o | --budget)
                [[ ${2-} ]] || fail "$1: needs a value; -h shows which"
                case $1 in
                    -d) dataset=$2 ;;
                    -o) output=$2 ;;
                    --budget) budget=$2 ;;
                esac
                shift 2
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            --)
                shift
                flags=("$@")
                break
                ;;
            -*) fail "unknown option '$1'; -h shows the options, flags for cifar.py go after --" ;;
            *) recipes+=("$1") && shift ;;
        esac
    done
    ((${#recipes[@]})) || fail 'name a recipe; ./launcher.sh --list shows them'
    [[ ! $budget || $budget =~ ^[1-9][0-9]{0,6}$ ]] || fail "--budget '$budget': give whole seconds"
}

tool() {
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m "$@"
}

# Train one recipe until it ends or the time is up, and set status.
train() {
    local recipe=$1 log=$output/$dataset/$1.out limit=0 # Means no limit.
    [[ ! $budget ]] || limit=$((budget - margin - SECONDS))
    mkdir -p "$output/$dataset"
    # The run is in the background, so that a signal to this script is not kept waiting.
    timeout --foreground --preserve-status --kill-after=60 "$limit" "$BASH" "$root/launcher.sh" \
        -m "$recipe" -d "$dataset" -- --checkpoint "$output/$dataset/$recipe" --resume auto \
        "${flags[@]}" >>"$log" 2>&1 &
    pid=$!
    status=0
    wait "$pid" || status=$?
    pid=''
    if ((status != 0 && status != again && status != stopped)); then
        tail -n 20 "$log" >&2
        printf 'error: %s has failed with exit code %d; its output is %s\n' \
            "$recipe" "$status" "$log" >&2
        exit "$status"
    fi
}

# Pass a signal on and wait for the run's last save.
stop() {
    if [[ $pid ]]; then
        kill -s "$1" "$pid" 2>/dev/null || true
        wait "$pid" || true
    fi
    exit "$2"
}

# Succeed where there is time for more than the start of a run.
has_time() {
    [[ ! $budget ]] || ((budget - SECONDS > 2 * margin))
}

main() {
    local python plan recipe order=() status left=0
    parse_options "$@"
    python=$("$root/setup.sh" --which)
    plan=$(tool tools.cost "${recipes[@]}") || exit 2
    mapfile -t order < <(cut -d ' ' -f 1 <<<"$plan")
    trap 'stop TERM 143' TERM
    trap 'stop INT 130' INT
    for recipe in "${order[@]}"; do
        has_time || break
        tool tools.results state "$output/$dataset/$recipe" >/dev/null && continue
        train "$recipe"
        ((status == 0)) || break
    done
    for recipe in "${order[@]}"; do
        printf '%s: ' "$recipe"
        tool tools.results state "$output/$dataset/$recipe" || left=1
    done
    ((left)) || return 0
    printf 'something is left: run me again\n'
    exit "$again"
}

main "$@"
