#!/usr/bin/env bash
# Lint and tests. Arguments go to pytest; --slow adds the slow tests, --lint leaves all tests out.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
cd "$here"

marks='not slow and not gpu' lint_only=0
arguments=()
for argument in "$@"; do
    case $argument in
        --slow) marks='not gpu' ;;
        --lint) lint_only=1 ;;
        -h | --help)
            echo 'usage: ./run_tests.sh [--lint | --slow] [arguments for pytest]'
            exit 0
            ;;
        *) arguments+=("$argument") ;;
    esac
done

python=$("$BASH" ./setup.sh --dev --which)
programs=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
shopt -s nullglob
scripts=(*.sh bench/*.sh tools/*.sh .ci/run)

run() {
    printf '+ %s\n' "$*"
    "$@"
}

run "$python" -m ruff check .
run "$python" -m ruff format --check .
run "$python" -m mypy
run "$programs/lint-imports" --no-cache --no-logo
run "$programs/shellcheck" "${scripts[@]}"
((lint_only == 0)) || exit 0
# Most tests start processes of one thread, so two run side by side even on two cores.
run "$python" -m pytest -m "$marks" --numprocesses auto --maxprocesses 4 "${arguments[@]}"
