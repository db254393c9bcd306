#!/usr/bin/env bash
# Build the last release of Horovod for the torch of one environment and install it there.
# The wheel is kept, so that the next environment of the same kind has it in seconds.
set -euo pipefail

usage() {
    cat <<'END'
usage: tools/build_horovod.sh PYTHON
  PYTHON   interpreter of the environment that gets Horovod; torch must be installed there
environment:
  HOROVOD_GPU_OPERATIONS   NCCL builds for GPUs, empty for the CPU only (default: NCCL where
                           nvidia-smi lists a GPU and torch is built for CUDA)
  HOROVOD_CUDA_HOME        CUDA toolkit for a GPU build (default: from torch's CUDA 13 or newer
                           on, the one of the package index; else /usr/local/cuda)
  HOROVOD_NCCL_HOME        folder with NCCL's include/ and lib/ (default: the NCCL of torch)
  CXX                      C++ compiler
  MAKEFLAGS                such as -j4 (default: one job per core)
  XDG_CACHE_HOME           where wheels and logs are kept (default: ~/.cache)
END
}

say() {
    printf 'build_horovod.sh: %s\n' "$1" >&2
}

fail() {
    say "$1"
    exit "${2:-2}"
}

release=0.28.1
sdist=horovod-$release.tar.gz
sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
# What setup.py imports; in a folder of their own, so that the environment keeps its versions.
build_tools=(setuptools==80.9.0 packaging==25.0)

here=${BASH_SOURCE[0]%/*}
[[ $here != "${BASH_SOURCE[0]}" ]] || here=.
here=$(cd "$here" && pwd)
patch_file=$here/horovod-$release.patch

python='' work='' log='' partial='' step=''
facts=() wheel=()

# One step of the work: output to the log, and in a process group that dies with this script.
run() {
    local status=0
    set -m
    "$@" </dev/null >>"$log" 2>&1 &
    step=$!
    set +m
    wait "$step" || status=$?
    step=''
    return "$status"
}

clean_up() {
    if [[ $step ]]; then
        kill -TERM -- "-$step" 2>/dev/null || true
        wait "$step" 2>/dev/null || true
        kill -KILL -- "-$step" 2>/dev/null || true
    fi
    if [[ $partial ]]; then rm -f "$partial"; fi
    if [[ $work ]]; then rm -rf "$work"; fi
}

# MESSAGE STATUS: the end of the log, then the message with the log's name.
fail_with_log() {
    tail -n 30 "$log" >&2 || true
    fail "$1; the whole log is $log" 1
}

check_python() {
    python=$(command -v "$1") || fail "$1: no such interpreter; give the python of an environment"
    [[ $python == /* ]] || python=$PWD/$python
    [[ $OSTYPE == linux* ]] || fail "$OSTYPE: Horovod is built on Linux only; use the other engine"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$1: older than Python 3.10; give a newer one"
}

# Which collectives to build: what the environment asks for, else what the machine has.
read_options() {
    gpu=cpu mpi=no-mpi gpu_asked=${HOROVOD_GPU_OPERATIONS-auto} gpu_archs=''
    case $gpu_asked in
        NCCL) gpu=nccl ;;
        auto) [[ $(nvidia-smi -L 2>/dev/null) != *"GPU "* ]] || gpu=nccl ;;
        '') ;;
        *) fail "HOROVOD_GPU_OPERATIONS=$gpu_asked: give NCCL, or nothing for the CPU only" ;;
    esac
    if [[ $gpu == nccl ]]; then
        gpu_archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
            tr -d . | sort -nu | paste -sd,) || gpu_archs=''
    fi
    if command -v mpirun >/dev/null && command -v mpicxx >/dev/null; then mpi=mpi; fi

    compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
    compiler_kind=none
    if [[ $compiler ]] && compiler_kind=$("$compiler" --version 2>/dev/null); then
        [[ $compiler_kind == *clang* ]] && compiler_kind=clang || compiler_kind=gcc
        compiler_kind+=$("$compiler" -dumpversion)
        compiler_kind=${compiler_kind%%.*}
    else
        compiler='' compiler_kind=none
    fi
}

# Sets facts: torch's version, its CUDA, the version that a right Horovod has, whether that one is
# installed, NCCL's folder, Python's headers, the processor's vector flags and the cache's key.
# Nothing is imported, so this takes a moment only.
read_facts() {
    local answer
    answer=$("$python" - "$patch_file" "$release" "$gpu" "$gpu_asked" "$gpu_archs" "$mpi" <<'END'
import hashlib
import platform
import re
import runpy
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

patch, release, gpu, gpu_asked, gpu_archs, mpi = sys.argv[1:]
torch = util.find_spec("torch")
if torch is None or torch.origin is None:
    print("no torch")
    sys.exit()
about = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
version, cuda = str(about["__version__"]), about.get("cuda") or "none"
if cuda == "none" and gpu_asked == "auto":
    gpu = "cpu"

cpu = Path("/proc/cpuinfo")
found = set(re.findall(r"\b(?:avx|f16c|fma)\b", cpu.read_text())) if cpu.exists() else set()
archs = " ".join(f"-m{flag}" for flag in sorted(found))
tag = f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
system = f"{sysconfig.get_platform()}-{'-'.join(platform.libc_ver())}"
parts = [version, tag, system, archs, gpu, gpu_archs, mpi]
digest = hashlib.sha256(repr(parts).encode() + Path(patch).read_bytes()).hexdigest()[:12]
wanted = f"{release}+cifar.{digest}"

installed = "no"
try:
    horovod = metadata.distribution("horovod")
    library = f"horovod/torch/mpi_lib_v2{sysconfig.get_config_var('EXT_SUFFIX')}"
    if horovod.version == wanted and Path(str(horovod.locate_file(library))).is_file():
        installed = "yes"
except metadata.PackageNotFoundError:
    pass
try:
    nccl = util.find_spec("nvidia.nccl")
except ModuleNotFoundError:
    nccl = None
print(version, cuda, wanted, installed, gpu, sep="\n")
print(next(iter(nccl.submodule_search_locations), "none") if nccl else "none")
print((Path(sysconfig.get_path("include")) / "Python.h").is_file(), archs or "none", sep="\n")
print(f"torch{version}-{tag}-{system}-{gpu}-{mpi}-{digest}")
END
    )
    [[ $answer != "no torch" ]] || fail "$python: torch is not installed there; ./setup.sh installs it"
    mapfile -t facts <<<"$answer"
    torch=${facts[0]} torch_cuda=${facts[1]} wanted=${facts[2]} installed=${facts[3]}
    gpu=${facts[4]} nccl=${facts[5]} headers=${facts[6]} arch_flags=${facts[7]}
    key=${facts[8]}-$compiler_kind
}

find_wheel() {
    shopt -s nullglob
    wheel=("$folder"/horovod-*.whl)
    shopt -u nullglob
    ((${#wheel[@]}))
}

# Whether the compiler has the C++ that torch's headers are written in.
has_standard() {
    local standard=17 header=filesystem
    if [[ $torch =~ ^2\.([0-9]+) ]] && ((BASH_REMATCH[1] >= 15)) || [[ ! $torch =~ ^[012]\. ]]; then
        standard=20 header=concepts
    fi
    "$compiler" "-std=c++$standard" -x c++ -fsyntax-only - <<<"#include <$header>" 2>/dev/null ||
        fail "$compiler: no C++$standard, which torch $torch needs; install a newer g++ and set CXX"
}

check_gpu_build() {
    [[ $torch_cuda != none ]] ||
        fail "HOROVOD_GPU_OPERATIONS=NCCL: torch $torch has no CUDA; install a CUDA build of torch"
    [[ ${HOROVOD_NCCL_HOME:-} || -d $nccl/include ]] ||
        fail "HOROVOD_NCCL_HOME: unset, and torch came without NCCL's headers; name NCCL's folder"
    cuda_home=${HOROVOD_CUDA_HOME:-}
    if [[ ! $cuda_home ]] && ((${torch_cuda%%.*} < 13)); then cuda_home=/usr/local/cuda; fi
    [[ ! $cuda_home || -x $cuda_home/bin/nvcc ]] ||
        fail "HOROVOD_CUDA_HOME: no bin/nvcc in $cuda_home; name the folder of a CUDA \
${torch_cuda%%.*} toolkit, or set HOROVOD_GPU_OPERATIONS= to build for the CPU only"
}

# Everything that a build needs, before anything is written.
check_tools() {
    local packages=() tool version
    [[ $compiler ]] || packages+=(g++)
    for tool in cmake make patch; do
        command -v "$tool" >/dev/null || packages+=("$tool")
    done
    [[ $headers == True ]] || packages+=(python3-dev)
    command -v flock >/dev/null || packages+=(util-linux)
    ((${#packages[@]} == 0)) ||
        fail "Horovod is built from source and misses tools here: apt-get install ${packages[*]}"
    version=$(cmake --version)
    if [[ $version =~ ([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] < 4 && BASH_REMATCH[2] < 13)); then
        fail "cmake is older than 3.13; pip install cmake gives a newer one"
    fi
    "$python" -m pip --version >/dev/null 2>&1 ||
        fail "$python: no pip there; $python -m ensurepip installs it"
    has_standard
    [[ $gpu == cpu ]] || check_gpu_build
}

lock() {
    mkdir -p "$folder" 2>/dev/null || fail "$folder: cannot be made; set XDG_CACHE_HOME"
    exec {lock_file}>"$cache/lock"
    if ! flock --nonblock "$lock_file"; then
        say "another call is building or installing; waiting for it"
        run flock "$lock_file"
    fi
}

is_release() {
    sha256sum --check --status 2>/dev/null <<<"$sha256  $1"
}

# The source distribution, checked against the release's digest before anything in it runs.
fetch() {
    is_release "$cache/$sdist" && return
    printf 'horovod==%s --hash=sha256:%s\n' "$release" "$sha256" >"$work/requirements.txt"
    # pip runs setup.py for the metadata; with a digest it first checks what it has downloaded.
    run env PYTHONPATH="$work/tools" "$python" -m pip download --quiet --no-deps \
        --no-binary horovod --no-build-isolation --no-cache-dir --require-hashes \
        --dest "$work" --requirement "$work/requirements.txt" ||
        fail_with_log "downloading $sdist failed"
    is_release "$work/$sdist" || fail "$sdist: not the file of the release (sha256)" 1
    partial=$cache/.$sdist.partial
    cp "$work/$sdist" "$partial"
    mv -f "$partial" "$cache/$sdist"
}

pip_into() {
    run "$python" -m pip install --quiet --target "$@"
}

# Sets cuda_home and nccl_home for a GPU build.
gpu_parts() {
    if [[ ! $cuda_home ]]; then
        pip_into "$work/cuda" "cuda-toolkit[nvcc,cccl]==$torch_cuda.*" ||
            fail_with_log "downloading the CUDA $torch_cuda toolkit failed"
        cuda_home=$work/cuda/nvidia/cu${torch_cuda%%.*}
        # The wheels have the names that programs load, not the one that CMake looks for.
        ln -s "libcudart.so.${torch_cuda%%.*}" "$cuda_home/lib/libcudart.so"
        ln -s lib "$cuda_home/lib64"
    fi
    nccl_home=${HOROVOD_NCCL_HOME:-$work/nccl}
    if [[ $nccl_home == "$work/nccl" ]]; then
        mkdir -p "$nccl_home/lib"
        ln -s "$nccl/include" "$nccl_home/include"
        ln -s "$nccl"/lib/libnccl.so.* "$nccl_home/lib/libnccl.so"
    fi
}

# Sets settings, the environment of the build.
read_settings() {
    local name
    # What stands in the caller's environment would make a wheel that its key does not describe.
    settings=()
    for name in "${!HOROVOD_@}" CFLAGS CPPFLAGS CMAKE_GENERATOR CMAKE_BUILD_TYPE CCL_ROOT; do
        settings+=("--unset=$name")
    done
    settings+=(
        HOROVOD_WITH_GLOO=1 HOROVOD_WITH_PYTORCH=1
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        HOROVOD_LOCAL_VERSION="${wanted#*+}" HOROVOD_CMAKE="$(command -v cmake)"
        CXX="$compiler" CXXFLAGS="-ffile-prefix-map=$work/=" LDFLAGS="-Wl,--strip-debug"
        MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}" PYTHONPATH="$work/tools" TMPDIR="$work/tmp"
    )
    [[ $arch_flags == none ]] || settings+=(HOROVOD_BUILD_ARCH_FLAGS="$arch_flags")
    if [[ $mpi == mpi ]]; then
        settings+=(HOROVOD_WITH_MPI=1)
    else
        settings+=(HOROVOD_WITHOUT_MPI=1)
    fi
    if [[ $gpu == nccl ]]; then
        gpu_parts
        settings+=(
            HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_CUDA_HOME="$cuda_home" CUDA_HOME="$cuda_home"
            HOROVOD_NCCL_HOME="$nccl_home" HOROVOD_NCCL_LINK=SHARED
        )
        [[ ! $gpu_archs ]] || settings+=(HOROVOD_BUILD_CUDA_CC_LIST="$gpu_archs")
    else
        settings+=(HOROVOD_WITHOUT_NVTX=1)
    fi
}

build() {
    local started=$SECONDS built
    log=$folder/build.log
    : >"$log"
    work=$(mktemp -d "${TMPDIR:-/tmp}/horovod.XXXXXX")
    mkdir "$work/tmp"
    say "building Horovod $release for torch $torch ($gpu, $mpi), about 4 minutes on two cores"
    say "log: $log"
    pip_into "$work/tools" --no-deps "${build_tools[@]}" ||
        fail_with_log "downloading ${build_tools[*]} failed"
    fetch
    tar -xzf "$cache/$sdist" -C "$work"
    run patch --directory "$work/horovod-$release" --strip=1 --batch --forward --fuzz=0 \
        --input "$patch_file" || fail_with_log "$patch_file does not fit the release"
    read_settings
    run env "${settings[@]}" "$python" -m pip wheel --verbose --use-pep517 --no-build-isolation \
        --no-deps --wheel-dir "$work/wheel" "$work/horovod-$release" ||
        fail_with_log "building Horovod failed"
    built=("$work"/wheel/horovod-*.whl)
    partial=$folder/.${built[0]##*/}.partial
    cp "${built[0]}" "$partial"
    mv -f "$partial" "$folder/${built[0]##*/}"
    find_wheel || fail_with_log "the build left no wheel"
    say "built in $((SECONDS - started)) s; the wheel is kept in $folder"
}

install_wheel() {
    log=$folder/install.log
    : >"$log"
    # By name and not by the wheel's metadata: a broken copy of the same version is replaced too.
    { run "$python" -m pip install --quiet --force-reinstall --no-deps "${wheel[0]}" &&
        run "$python" -m pip install --quiet cloudpickle psutil pyyaml packaging; } ||
        fail_with_log "installing ${wheel[0]##*/} failed"
}

# Two workers sum a tensor, on the GPUs where there are two for them.
verify() {
    local name kept=() program='import sys, torch, horovod.torch as hvd; hvd.init();
gpus = hvd.nccl_built() and torch.cuda.device_count() > 1;
device = torch.device("cuda", hvd.local_rank()) if gpus else torch.device("cpu");
total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0], device=device), op=hvd.Sum).item();
sys.exit(hvd.size() != 2 or total != 3)'
    # horovodrun puts the whole environment on a command line, where names are run as code.
    for name in PATH HOME LANG TMPDIR LD_LIBRARY_PATH PYTHONPATH CUDA_VISIBLE_DEVICES; do
        [[ ! ${!name:-} ]] || kept+=("$name=${!name}")
    done
    run env -i OMP_NUM_THREADS=1 "${kept[@]}" timeout 120 "$python" -m horovod.runner.launch \
        --gloo -np 2 -H localhost:2 --network-interfaces lo --disable-cache \
        "$python" -c "$program" && return
    run "$python" -m pip uninstall --quiet --yes horovod || true
    fail_with_log "two workers could not sum a tensor, so Horovod was taken out again"
}

main() {
    [[ ${1:-} != -h && ${1:-} != --help ]] || { usage && exit 0; }
    (($# == 1)) || fail "give one interpreter; -h shows the usage"
    check_python "$1"
    read_options
    read_facts
    if [[ $installed == yes ]]; then
        say "Horovod $release for torch $torch ($gpu, $mpi) is installed already"
        exit 0
    fi
    # Not a name in /tmp: anybody could have put a wheel there.
    [[ ${XDG_CACHE_HOME:-${HOME:-}} ]] ||
        fail 'HOME: unset; set it, or XDG_CACHE_HOME, to where the wheel is to be kept'
    cache=${XDG_CACHE_HOME:-${HOME:-}/.cache}/cifar-allreduce/horovod
    folder=$cache/$key
    if ! find_wheel; then check_tools; fi

    trap clean_up EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    log=/dev/null
    lock
    read_facts
    if [[ $installed == no ]]; then
        if ! find_wheel; then build; fi
        install_wheel
        verify
    fi
    say "installed for $python: two workers summed a tensor"
}

main "$@"
