#!/usr/bin/env bash
# From a recipe, a number of workers, GPUs and a data set to one command, printed and started. This
# file finds a Python and gives way to utils/launch/cli.py, which does the rest.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

is_project() {
    [[ -f $1/setup.sh && -f $1/utils/launch/cli.py ]]
}

# Prints the folder of the project. sbatch and qsub run a copy of this file, which lies elsewhere.
find_root() {
    local folder job=''
    folder=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
    if ! is_project "$folder" && [[ ${SLURM_JOB_ID-} ]] && command -v scontrol >/dev/null; then
        job=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep '^ *Command=/') || job=''
        job=${job#*Command=} job=${job%%/launcher.sh*}
    fi
    for folder in "$folder" "$job" "${SLURM_SUBMIT_DIR-}" "${PBS_O_WORKDIR-}"; do
        if [[ $folder ]] && is_project "$folder"; then
            (cd "$folder" && pwd -P)
            return
        fi
    done
    return 1
}

# A folder that one may not search is another matter: there . cannot be looked at.
[[ -d $PWD && (! -e . || . -ef $PWD) ]] ||
    fail 'the folder where you stand has been removed; go to another'
root=$(find_root) ||
    fail "$0 is a copy outside its project; call the launcher.sh there, or submit from its folder"

# Without an environment any Python answers questions and refuses what is wrong; the environment is
# installed just before it is needed.
status=0
python=$("$BASH" "$root/setup.sh" --find) || status=$?
case $status in
    0) unset CIFAR_PYTHON ;;
    1)
        export CIFAR_PYTHON=$python
        python=$(command -v python3 || command -v python) || fail 'no Python found; install python3'
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 ||
            fail "$python does not run as Python 3.10 or later; put one first on PATH"
        ;;
    *) exit "$status" ;;
esac
exec "$python" "$root/utils/launch/cli.py" "$@"
