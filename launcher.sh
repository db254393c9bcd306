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
  --port N     dist: port of the rendezvous on 127.0.0.1 (default: a free one)
  --hosts LIST horovod: host:slots,... for workers on several machines (default: all here)
  --network-interfaces LIST
               horovod: those that the hosts reach each other by, such as eth0 (default: lo where
               all workers are here, else Horovod looks for them)
  --min-np N, --max-np N, --host-discovery-script FILE
               horovod: go on with any number of workers between N and N when some are lost or new
               ones come; FILE prints the hosts of the moment, host:slots a line
  --max-restarts N
               start again, from the newest checkpoint, after a failure that need not come again:
               a killed or stalled worker, a lost connection (default: 3; 0 to 1000)
  --yes        horovod: build it first where it is missing (minutes, once)
  --list       show the recipes
  --dry-run    print the command and its environment, start nothing
  --compare    train with one process, dist and horovod; compare losses, parameters and speed
  --verify     prove on this machine that workers, engine and interruptions change no result
  --bench [loader|step|epoch|scaling|allreduce|all]
               measure this machine (minutes), write bench-results/; -- -h lists its flags
  -h           this text
What stands after -- goes to cifar.py and wins over the recipe; python cifar.py -h lists its flags.
END
}

# One line that a person can read, whatever a value has brought into it.
fail() {
    local text=${1//[^[:print:]]/?}
    ((${#text} <= 400)) || text=${text:0:200}...${text: -190}
    printf 'error: %s\n' "$text" >&2
    exit 2
}

root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
datasets=(cifar10 cifar100 folder synthetic10 synthetic100)

model='' workers='' gpus='' dataset=cifar10 engine=dist port='' hosts='' interfaces='' min_np='' max_np='' discovery='' restarts=3 dry_run=0 list=0 yes=0 tool='' benchmark=all
flags=()

parse_options() {
    while (($#)); do
        case $1 in
            -m | -n | -g | -d | -f | --port | --hosts | --network-interfaces | --min-np | --max-np | --host-discovery-script | --max-restarts)
                [[ ${2-} != '' && $2 != -[^0-9]* ]] || fail "$1 '${2-}': needs a value; ./launcher.sh -h shows which"
                case $1 in
                    -m) model=$2 ;;
                    -n) workers=$2 ;;
                    -g) gpus=$2 ;;
                    -d) dataset=$2 ;;
                    -f) engine=$2 ;;
                    --port) port=$2 ;;
                    --hosts) hosts=$2 ;;
                    --network-interfaces) interfaces=$2 ;;
                    --min-np) min_np=$2 ;;
                    --max-np) max_np=$2 ;;
                    --host-discovery-script) discovery=$2 ;;
                    --max-restarts) restarts=$2 ;;
                esac
                shift 2
                ;;
            --port=* | --hosts=* | --network-interfaces=* | --min-np=* | --max-np=* | --host-discovery-script=* | --max-restarts=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                ;;
            -[mngdf]?*) set -- "${1:0:2}" "${1:2}" "${@:2}" ;;
            --list) list=1 && shift ;;
            --dry-run) dry_run=1 && shift ;;
            --yes) yes=1 && shift ;;
            --compare | --verify) tool=tools.${1#--} && shift ;;
            --bench)
                tool=bench && shift
                if [[ ${1-} && $1 != -* ]]; then
                    benchmark=$1 && shift
                fi
                ;;
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

# A path of the project, short where the user stands in its folder.
from_here() {
    if [[ $PWD -ef $root ]]; then
        printf '%s\n' "$1"
    else
        printf '%s\n' "$root/$1"
    fi
}

# Sets python, the interpreter that will train, and small_python, one for questions that need no
# package; they differ before the first set-up.
find_python() {
    local status=0
    python=$("$root/setup.sh" --find) || status=$?
    case $status in
        0) small_python=$python ;;
        1) small_python=$(command -v python3 || command -v python) ;;
        *) exit "$status" ;;
    esac
}

# Python for a question. In the project's folder: where the user stands a random.py may lie, which
# Python would take for its own.
ask() {
    (cd "$root" && exec env --unset=PYTHONSAFEPATH "$small_python" "$@")
}

recipes() {
    ask -m utils.config.recipes "$@"
}

# Sets safe to the option that has the same effect for the programs that start where the user
# stands; Python 3.10 has none.
find_safe() {
    ! "$1" -P -c '' 2>/dev/null || safe=(-P)
}

check_dataset() {
    local known
    for known in "${datasets[@]}"; do
        [[ $dataset != "$known" ]] || return 0
    done
    known=$(ask - "$dataset" "${datasets[@]}" <<'END'
import difflib
import sys

word, *known = sys.argv[1:]
print(*difflib.get_close_matches(word.lower(), known) or known, sep=", ")
END
    )
    fail "-d '$dataset': no such data set; choose from $known"
}

check_benchmark() {
    case $benchmark in
        loader | step | epoch | scaling | allreduce | all) ;;
        *) fail "--bench '$benchmark': no such benchmark; choose loader, step, epoch, scaling, allreduce or all" ;;
    esac
}

check_engine() {
    case $engine in
        dist)
            [[ -z $hosts ]] || fail "--hosts $hosts: for -f horovod; leave it out"
            [[ -z $interfaces ]] || fail "--network-interfaces $interfaces: for -f horovod; leave it out"
            ;;
        horovod) [[ -z $port ]] || fail "--port $port: for -f dist; leave it out" ;;
        *) fail "-f '$engine': no such engine; choose dist or horovod" ;;
    esac
}

# Checks hosts, or sets it to this machine. Host names end up in ssh commands.
check_hosts() {
    local entry slots=0
    hosts=${hosts:-localhost:$workers}
    [[ $hosts =~ ^[A-Za-z0-9][A-Za-z0-9.-]*:[1-9][0-9]{0,3}(,[A-Za-z0-9][A-Za-z0-9.-]*:[1-9][0-9]{0,3})*$ ]] ||
        fail "--hosts '$hosts': give host:slots,host:slots,..."
    for entry in ${hosts//,/ }; do
        slots=$((slots + ${entry##*:}))
        case ${entry%:*} in
            localhost | 127.* | "${HOSTNAME-}") ;;
            *) command -v ssh >/dev/null ||
                fail "--hosts $hosts: ssh, which starts workers on other machines, is not installed" ;;
        esac
    done
    ((workers <= slots)) || fail "-n $workers: more workers than the $slots slot(s) of --hosts $hosts"
}

# Checks interfaces, or sets it to the loopback where all hosts are this machine.
check_interfaces() {
    local local_hosts='^(localhost|127\.0\.0\.1):[0-9]+(,(localhost|127\.0\.0\.1):[0-9]+)*$' name
    if [[ $interfaces ]]; then
        [[ $interfaces =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*(,[A-Za-z0-9][A-Za-z0-9_.-]*)*$ ]] ||
            fail "--network-interfaces '$interfaces': give names such as eth0, separated by commas"
        for name in ${interfaces//,/ }; do
            [[ ! -e /sys/class/net || -e /sys/class/net/$name ]] ||
                fail "--network-interfaces '$interfaces': no $name here; /sys/class/net lists those that are"
        done
    elif [[ ! $discovery && $hosts =~ $local_hosts && -e /sys/class/net/lo ]]; then
        interfaces=lo
    fi
}

# Checks min_np, max_np and discovery: Horovod Elastic.
check_elastic() {
    local flag value
    [[ $min_np$max_np$discovery ]] || return 0
    [[ $engine == horovod ]] ||
        fail "--min-np, --max-np, --host-discovery-script: for -f horovod; leave them out"
    for flag in --min-np --max-np; do
        value=$min_np
        [[ $flag == --min-np ]] || value=$max_np
        [[ -z $value || $value =~ ^[1-9][0-9]{0,3}$ ]] ||
            fail "$flag '$value': give a whole number from 1 to 9999"
    done
    min_np=${min_np:-$workers} max_np=${max_np:-$workers}
    ((min_np <= workers && workers <= max_np)) ||
        fail "--min-np $min_np --max-np $max_np: -n $workers must lie between them"
    [[ -z $discovery ]] || [[ -f $discovery && -x $discovery && -z $hosts ]] ||
        fail "--host-discovery-script '$discovery': give a program that prints host:slots lines, and no --hosts"
    [[ $discovery || $hosts == *,* ]] ||
        fail "--min-np $min_np: needs --host-discovery-script FILE, or two entries in --hosts"
}

# How many GPUs the driver shows.
gpu_count() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        local cards=(/proc/driver/nvidia/gpus/*)
        [[ -e ${cards[0]} ]] && echo "${#cards[@]}" || echo 0
    fi
}

core_count() {
    env -u OMP_NUM_THREADS nproc # which would answer with that variable
}

# Checks gpus against the machine and sets visible, the number of GPUs to use.
check_gpus() {
    local id seen=,
    visible=$(gpu_count)
    if [[ -z $gpus ]]; then
        if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
            id=$(grep -o '[^,]\+' <<<"$CUDA_VISIBLE_DEVICES" | grep -vc '^-' || true)
            visible=$((id < visible ? id : visible))
        fi
        return
    fi
    [[ $gpus =~ ^(0|[1-9][0-9]{0,3})(,(0|[1-9][0-9]{0,3}))*$ ]] ||
        fail "-g '$gpus': give ids such as 0 or 0,1"
    ((visible)) || fail "-g $gpus: this machine has no GPU; leave -g out to train on the CPU"
    for id in ${gpus//,/ }; do
        ((id < visible)) ||
            fail "-g $gpus: no GPU $id here; this machine has $visible, numbered from 0 to $((visible - 1))"
        [[ $seen != *,$id,* ]] || fail "-g $gpus: $id stands there twice; give each id once"
        seen+=$id,
    done
    visible=$(wc -w <<<"${gpus//,/ }")
}

# Checks workers, or sets it to its default.
check_workers() {
    local most
    workers=${workers:-$((visible ? visible : 1))}
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "-n '$workers': give a whole number of 1 or more"
    if ((visible)); then
        [[ ${#workers} -lt 5 && $workers -le $visible ]] ||
            fail "-n $workers: more workers than the $visible GPU(s) to use; give at most -n $visible"
    else
        most=$((16 * $(core_count)))
        [[ ${#workers} -lt 6 && $workers -le $most ]] ||
            fail "-n $workers: too many for the $((most / 16)) core(s) here; give at most -n $most"
    fi
}

check_restarts() {
    [[ $restarts =~ ^(0|[1-9][0-9]{0,3})$ && $restarts -le 1000 ]] ||
        fail "--max-restarts '$restarts': give a whole number from 0 to 1000"
}

# A control character in the printed command would not be what it looks like.
check_flags() {
    local flag
    for flag in "${flags[@]}"; do
        [[ $flag != *[[:cntrl:]]* ]] || fail "-- ${flag@Q}: holds a control character; leave it out"
    done
}

check_port() {
    [[ $port ]] || return 0
    [[ $port =~ ^[1-9][0-9]{3,4}$ && $port -ge 1024 && $port -le 65535 ]] ||
        fail "--port '$port': give a number from 1024 to 65535"
    ask - "$port" <<'END' || fail "--port $port: in use on 127.0.0.1; leave it out for a free one"
import socket
import sys

try:
    socket.create_server(("127.0.0.1", int(sys.argv[1])))
except OSError:
    sys.exit(1)
END
}

# Sets dropped to what would change the meaning of ours: leftovers of an outer launcher, and what
# keeps a script from finding its own modules.
find_dropped() {
    local name
    for name in $(compgen -e); do
        case $name in
            MASTER_ADDR | MASTER_PORT | RANK | WORLD_SIZE | LOCAL_RANK | LOCAL_WORLD_SIZE | NODE_RANK | \
                GROUP_RANK | GROUP_WORLD_SIZE | ROLE_* | PYTHON_EXEC | PYTHONSAFEPATH | PET_* | \
                TORCHELASTIC_*)
                dropped+=("$name")
                ;;
        esac
    done
}

# The module that starts the workers: torch.distributed.launch, or run where launch is gone.
launch_module() {
    ask - <<'END'
import importlib.util
from pathlib import Path

spec = importlib.util.find_spec("torch")
gone = spec and not (Path(spec.origin).parent / "distributed" / "launch.py").exists()
print("torch.distributed.run" if gone else "torch.distributed.launch")
END
}

# Adds the start of the command, up to the script's own flags, to command and environment.
dist_command() {
    local script
    script=$(from_here cifar.py)
    # launch announces that it will be replaced one day; nobody who trains can act on that.
    # Without a log folder it would make one in /tmp at each start and leave it there.
    command=("$python" "${safe[@]}" -W ignore::FutureWarning -m "$(launch_module)"
        "--nproc_per_node=$workers" --rdzv-backend=loopback "--rdzv-endpoint=127.0.0.1:${port:-0}"
        --log-dir=/dev/null "${script//'$'/'$$'}")
    # launch reads $ in what follows as the start of a name, and $$ as $.
    arguments=("${arguments[@]//'$'/'$$'}")
    # Workers meet where no other machine can reach them: utils/launch/loopback/loopback.py.
    environment+=("PYTHONPATH=$root/utils/launch/loopback${PYTHONPATH:+:$PYTHONPATH}")
    [[ ! -e /sys/class/net/lo ]] ||
        environment+=("GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}")
}

# The same for Horovod.
horovod_command() {
    local script horovodrun
    script=$(from_here cifar_horovod.py)
    horovodrun=${python%/*}/horovodrun
    command=("$python" "${safe[@]}" -m horovod.runner.launch)
    [[ ! -x $horovodrun ]] || command=("$python" "${safe[@]}" "$horovodrun")
    command+=(-np "$workers" --gloo --disable-cache)
    if [[ $discovery ]]; then
        [[ $discovery == */* ]] || discovery=./$discovery
        command+=(--host-discovery-script "$(printf %q "$discovery")") # horovodrun hands it to a shell
    else
        command+=(-H "$hosts")
    fi
    [[ -z $interfaces ]] || command+=(--network-interfaces "$interfaces")
    [[ -z $min_np ]] || command+=(--min-np "$min_np" --max-np "$max_np")
    command+=("$python" "$script")
}

has_horovod() {
    (cd "$root" && "$python" -c 'import importlib.util, sys
sys.exit(importlib.util.find_spec("horovod") is None)' 2>/dev/null)
}

# horovodrun puts the values of its environment on a command line that everybody can read, and
# runs what stands in their names: it gets those that training needs, by name.
allowed_environment() {
    local name
    while IFS= read -r name; do
        case $name in
            PATH | HOME | USER | LOGNAME | SHELL | LANG | LC_* | TERM | COLUMNS | LINES | TMPDIR | \
                LD_LIBRARY_PATH | VIRTUAL_ENV | PYTHON* | OMP_* | MKL_* | CUDA_* | NVIDIA_* | NCCL_* | \
                GLOO_* | HOROVOD_* | TORCH_* | PYTORCH_* | CIFAR_* | XDG_CACHE_HOME)
                printf '%s=%s\0' "$name" "${!name}"
                ;;
        esac
    done < <(compgen -e)
}

# Prints words such that a shell reads them as they are.
print_command() {
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || printf -v word %q "$word"
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# Runs the tool, a Python module, in the caller's folder.
run_tool() {
    python=$("$root/setup.sh" --which)
    find_safe "$python"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "${safe[@]}" -m "$tool" "$@"
}

main() {
    local python small_python visible recipe cores
    local command=() arguments=() shown=() environment=() dropped=() allowed=() safe=() start=()
    [[ -d $PWD ]] || fail 'the folder where you stand has been removed; go to another'
    parse_options "$@"
    if ((list)); then
        find_python
        recipes list
        return
    fi
    if [[ $tool == tools.verify ]]; then
        run_tool "${flags[@]}"
    fi
    if [[ $tool == bench ]]; then
        check_benchmark
        run_tool "$benchmark" "${flags[@]}"
    fi
    [[ $model ]] || fail '-m: name a recipe; ./launcher.sh --list shows them'
    check_engine
    check_gpus
    check_workers
    check_restarts
    check_elastic
    check_flags
    find_python
    check_dataset
    recipe=$(recipes find "$model") || exit 2
    mapfile -t arguments <<<"$recipe"
    model=${arguments[0]}
    if [[ $tool == tools.compare ]]; then
        run_tool -m "$model" -n "$workers" -d "$dataset" -- "${flags[@]}"
    fi
    case $engine in
        dist) check_port ;;
        horovod)
            check_hosts
            check_interfaces
            ;;
    esac
    ((dry_run)) || python=$("$root/setup.sh" --which)
    if [[ $engine == horovod ]] && ! ((dry_run)) && ! has_horovod; then
        ((yes)) || fail '-f horovod: Horovod is not installed; ./setup.sh --horovod builds it, or add --yes'
        "$root/setup.sh" --horovod
    fi
    [[ ! $PWD -ef $root ]] || python=${python#"$root/"}

    arguments=("${arguments[@]:1}" --dataset "$dataset")
    [[ $PWD -ef $root ]] || arguments+=(--data "$root/data")
    arguments+=(--checkpoint "$(from_here "checkpoints/$dataset/$model")" "${flags[@]}")
    cores=$(core_count)
    environment=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > workers ? cores / workers : 1))}")
    [[ -z $gpus && -z ${CUDA_VISIBLE_DEVICES+set} ]] ||
        environment+=("CUDA_VISIBLE_DEVICES=${gpus:-$CUDA_VISIBLE_DEVICES}")
    find_dropped
    find_safe "$small_python"
    "${engine}_command"
    command+=("${arguments[@]}")

    shown=("${environment[@]}" "${command[@]}")
    ((${#dropped[@]} == 0)) || shown=(env "${dropped[@]/#/--unset=}" "${shown[@]}")
    print_command "${shown[@]}"
    ((dry_run)) && return
    ((${#dropped[@]} == 0)) || unset "${dropped[@]}"
    export "${environment[@]}"
    start=("$python" "$root/utils/launch/supervisor.py" --max-restarts "$restarts")
    if [[ $engine == horovod ]]; then
        mapfile -d '' -t allowed < <(allowed_environment)
        exec env -i "${allowed[@]}" "${start[@]}" --tagged -- "${command[@]}"
    fi
    exec "${start[@]}" -- "${command[@]}"
}

main "$@"
