#!/usr/bin/env bash
# Make .venv beside this file with everything that training needs. A second call is quick.
set -euo pipefail

usage() {
    cat <<'END'
usage: ./setup.sh [--dev] [--which]
  --dev      also what run_tests.sh needs
  --which    print the interpreter to use: the active environment's where it has everything, else
             .venv's, which is set up first where it is missing
  -h         this text
END
}

fail() {
    printf 'setup.sh: %s\n' "$1" >&2
    exit 2
}

dev=0 which=0
for option in "$@"; do
    case $option in
        --dev) dev=1 ;;
        --which) which=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown option '$option'; ./setup.sh -h lists the options" ;;
    esac
done

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$here/.venv
files=("$here/requirements.txt")
((dev)) && files+=("$here/requirements-dev.txt")

# Whether an interpreter has every package; nothing is imported, so this takes a moment only.
has_all() {
    "$1" - "${files[@]}" 2>/dev/null <<'END'
import re
import sys
from importlib.metadata import distribution

for name in sys.argv[1:]:
    for line in open(name):
        if package := re.match(r"[\w-]+", line):
            distribution(package[0])
sys.exit(sys.version_info < (3, 10))
END
}

ready() {
    if ((which)); then
        printf '%s\n' "$venv/bin/python"
    else
        printf '%s is ready\n' "$venv" >&2
    fi
}

if ((which)); then
    for name in python python3; do
        if found=$(command -v "$name") && has_all "$found"; then
            printf '%s\n' "$found"
            exit 0
        fi
    done
fi

if [[ -x $venv/bin/python ]] && has_all "$venv/bin/python"; then
    ready
    exit 0
fi

python=$(command -v python3 || command -v python) || fail "no Python found; install python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is older than Python 3.10; activate a newer one"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make environments; install the package python3-venv"

printf 'setup.sh: installing torch and the rest into %s (several GB, once)\n' "$venv" >&2
[[ -x $venv/bin/python ]] || "$python" -m venv "$venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "${files[@]/#/--requirement=}" -c "$here/constraints.txt" >&2 ||
    fail "the installation failed; its message is above, a second call goes on where it stopped"
has_all "$venv/bin/python" || fail "$venv is incomplete; remove it and try again"
ready
