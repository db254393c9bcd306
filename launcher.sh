#!/usr/bin/env bash
# From a recipe, a number of workers, GPUs and a data set to one command, printed and started.
set -euo pipefail

usage() {
    cat <<'END'
usage: ./launcher.sh -m MODEL [-n WORKERS] [-g GPUS] [-d DATASET] [-f dist|horovod] [-- FLAGS]
  -m MODEL     a recipe, such as resnet110 or wrn-28-10 (--list shows them)
  -n WORKERS   worker processes (default: one per GPU of -g, else per GPU of the machine, else 1)
  -g GPUS      ids of the GPUs to use, such as 0,1 (default: all; the CPU where there is none)
  -d DATASET   cifar10 (default), cifar100, folder, synthetic10 or synthetic100
  -f ENGINE    dist (PyTorch DistributedDataParallel, default) or horovod
  --port N     port of the rendezvous on 127.0.0.1 (default: a free one)
  --list       show the recipes
  --dry-run    print the command and its environment, start nothing
  -h           this text
What stands after -- goes to cifar.py and wins over the recipe; python cifar.py -h lists its flags.
END
}

fail() {
    printf 'launcher.sh: %s\n' "$1" >&2
    exit 2
}

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
datasets=(cifar10 cifar100 folder synthetic10 synthetic100)

model='' workers='' gpus='' dataset=cifar10 engine=dist port='' dry_run=0 list=0
flags=()

parse_options() {
    while (($#)); do
        case $1 in
            -m | -n | -g | -d | -f | --port)
                (($# > 1)) && [[ $2 != -- ]] || fail "$1: needs a value; ./launcher.sh -h shows which"
                [[ -n $2 ]] || fail "$1 '': needs a value; ./launcher.sh -h shows which"
                case $1 in
                    -m) model=$2 ;;
                    -n) workers=$2 ;;
                    -g) gpus=$2 ;;
                    -d) dataset=$2 ;;
                    -f) engine=$2 ;;
                    --port) port=$2 ;;
                esac
                shift 2
                ;;
            --list) list=1 && shift ;;
            --dry-run) dry_run=1 && shift ;;
            -h | --help)
                usage
                exit 0
                ;;
            --)
                shift
                flags=("$@")
                return
                ;;
            *) fail "unknown option '$1'; flags for cifar.py go after --, ./launcher.sh -h shows the others" ;;
        esac
    done
}

# A Python for questions that need no torch.
small_python() {
    command -v python3 || command -v python || printf '%s\n' "$root/.venv/bin/python"
}

recipes() {
    (cd "$root" && exec "$(small_python)" -m utils.recipes "$@")
}

gpu_count() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        local cards=(/proc/driver/nvidia/gpus/*)
        [[ -e ${cards[0]} ]] && echo "${#cards[@]}" || echo 0
    fi
}

check_dataset() {
    local known
    for known in "${datasets[@]}"; do
        [[ $dataset == "$known" ]] && return
    done
    known=$("$(small_python)" -c 'import difflib, sys
print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:]) or sys.argv[2:], sep=", ")' \
        "$dataset" "${datasets[@]}")
    fail "-d '$dataset': no such data set; choose from $known"
}

# Sets workers and gpus, or says what is wrong with them.
check_workers() {
    local count id ids=()
    [[ -z $workers || $workers =~ ^[1-9][0-9]{0,3}$ ]] ||
        fail "-n '$workers': give a whole number of 1 or more"
    count=$(gpu_count)
    if [[ -n $gpus ]]; then
        [[ $gpus =~ ^[0-9]{1,3}(,[0-9]{1,3})*$ ]] || fail "-g '$gpus': give ids such as 0 or 0,1"
        IFS=, read -ra ids <<<"$gpus"
        ((count)) || fail "-g $gpus: this machine has no GPU; leave -g out to train on the CPU"
        for id in "${ids[@]}"; do
            ((10#$id < count)) || fail "-g $gpus: no GPU $id here; this machine has 0 to $((count - 1))"
        done
        [[ $(printf '%d\n' "${ids[@]/#/10#}" | sort -u | wc -l) == "${#ids[@]}" ]] ||
            fail "-g $gpus: an id stands there twice; give each once"
        count=${#ids[@]}
    elif [[ ${CUDA_VISIBLE_DEVICES+set} && $count -gt 0 ]]; then
        IFS=, read -ra ids <<<"$CUDA_VISIBLE_DEVICES"
        count=${#ids[@]}
    fi
    workers=${workers:-$((count > 0 ? count : 1))}
    ((count == 0 || workers <= count)) ||
        fail "-n $workers: more workers than the $count GPU(s) to use; give -n $count or more ids to -g"
}

# torch.distributed.run rewrites $ in arguments, and a control character in a printed command
# would not be what it looks like.
check_flags() {
    local flag
    for flag in "${flags[@]}"; do
        [[ $flag != *'$'* ]] || fail "-- '$flag': the launcher of torch rewrites \$; leave it out"
        [[ $flag != *[[:cntrl:]]* ]] || fail "-- ${flag@Q}: holds a control character; leave it out"
    done
}

check_port() {
    [[ -z $port || $port =~ ^[0-9]{4,5}$ ]] || fail "--port '$port': give a number from 1024 to 65535"
    ((10#${port:-1024} >= 1024 && 10#${port:-1024} <= 65535)) ||
        fail "--port $port: give a number from 1024 to 65535"
    port=$("$(small_python)" - "${port:-0}" <<'END'
import socket
import sys

with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        sys.exit(1)
    print(listener.getsockname()[1])
END
    ) || fail "--port $port: in use on 127.0.0.1; leave it out for a free one"
}

# The module that starts the workers: torch.distributed.launch, or run where launch is gone.
launch_module() {
    "$1" - <<'END'
import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("torch")
gone = spec and not (Path(spec.origin).parent / "distributed" / "launch.py").exists()
print("torch.distributed.run" if gone else "torch.distributed.launch")
END
}

# Sets command (an array) and environment (NAME=value words) for an engine.
dist_command() {
    local python=$1 module
    module=$(launch_module "$python")
    # The launcher announces that it will be replaced one day; nobody who trains can act on that.
    command=("$python" -W ignore::FutureWarning -m "$module" "--nproc_per_node=$workers"
        --master_addr=127.0.0.1 "--master_port=$port" "$(from_here cifar.py)")
    environment+=(GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}")
}

horovod_command() {
    fail "-f horovod: not available in this version; use -f dist"
}

# A path of the project, short where the caller stands in its folder.
from_here() {
    if [[ $PWD -ef $root ]]; then
        printf '%s\n' "$1"
    else
        printf '%s\n' "$root/$1"
    fi
}

main() {
    local recipe python cores command=() environment=()
    parse_options "$@"
    if ((list)); then
        recipes list
        return
    fi
    [[ -n $model ]] || fail "-m: name a recipe; ./launcher.sh --list shows them"
    recipe=$(recipes find "$model" 2>&1) || fail "$recipe"
    mapfile -t recipe_flags <<<"$recipe"
    model=${recipe_flags[0]}
    check_dataset
    [[ $engine == dist || $engine == horovod ]] || fail "-f '$engine': choose dist or horovod"
    check_workers
    check_flags
    check_port

    if ((dry_run)); then
        # Nothing is set up for a command that is only shown.
        python=$(command -v python || small_python)
    else
        python=$("$root/setup.sh" --which)
    fi
    cores=$(nproc)
    environment=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}")
    [[ -z $gpus ]] || environment+=(CUDA_VISIBLE_DEVICES="$gpus")
    "${engine}_command" "$python"
    command+=("${recipe_flags[@]:1}" --dataset "$dataset" --data "$(from_here data)"
        --checkpoint "$(from_here "checkpoints/$dataset/$model")" "${flags[@]}")

    printf '+'
    printf ' %q' "${environment[@]}" "${command[@]}"
    printf '\n'
    ((dry_run)) && return
    # What an outer launcher has left in the environment would change the meaning of ours.
    local name
    for name in $(compgen -e); do
        case $name in
            MASTER_ADDR | MASTER_PORT | RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | \
                GROUP_RANK | PYTHON_EXEC | PET_* | TORCHELASTIC_*) unset "$name" ;;
        esac
    done
    export "${environment[@]}"
    exec "$python" "$root/utils/supervise.py" -- "${command[@]}"
}

main "$@"
