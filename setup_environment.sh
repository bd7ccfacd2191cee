#!/usr/bin/env bash
# Create venv/ with everything that the project needs. Running it again does nothing if everything is there.
#
#   bash setup_environment.sh [--dev] [--latest] [--torch-version X] [--dry-run]
#   source venv/bin/activate
#
#   --dev              also the tools that tests/run.sh needs (requirements-dev.txt)
#   --latest           the newest packages within the ranges of requirements*.txt, not those that were tested together
#                      (constraints.txt); also LATEST=yes. An environment created this way stays so
#   --torch-version X  a torch of your choice within the range of requirements.txt; also TORCH_VERSION=X
#   --dry-run          say what would be done, and why; install nothing
#
# Time:    1 to 5 minutes at 100 Mbit/s and up, under 2 s if everything is there.
# Disk:    about 2 GB with a CPU-only torch, about 7 GB with the default index's torch (it brings CUDA).
# Network: pip's own configuration (index, extra indexes, find-links, constraints) applies. Without an NVIDIA GPU,
#          torch comes from the CPU-only index TORCH_INDEX_URL, or, if it gives no answer within PROBE_S seconds,
#          from the default index.
set -euo pipefail

PYTHON=${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10} # first one that fits is taken
VENV_DIR=${VENV_DIR:-venv}                                            # relative to this folder
TORCH_VERSION=${TORCH_VERSION:-}                                      # empty: the one in constraints.txt
LATEST=${LATEST:-no}
TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu} # empty: the default index, ask nobody
PROBE_S=${PROBE_S:-5}                                                   # empty: 5 seconds
CPU_DISK_GB=2
DEFAULT_DISK_GB=7

say() { echo "setup: $(text "$@")"; } # KEY VALUES...: a sentence of trimodal/messages.sh
die() {
    say "$@" >&2
    exit 2
}
usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]##*/}"; }

parse() {
    DEV=no DRY_RUN=no
    while [ $# -gt 0 ]; do
        case $1 in
            --dev) DEV=yes ;;
            --dry-run) DRY_RUN=yes ;;
            --latest) LATEST=yes ;;
            --torch-version) TORCH_VERSION=${2-nothing} && shift $(($# > 1)) ;;
            --torch-version=*) TORCH_VERSION=${1#*=} ;;
            -h | --help) usage && exit 0 ;;
            *) die unknown_flag "$1" ;;
        esac
        shift
    done
    case $TORCH_VERSION in
        '' | [0-9]*.[0-9]*.[0-9]*) ;;
        [0-9]*.[0-9]*) TORCH_VERSION=$TORCH_VERSION.0 ;;
        *) die no_version "$TORCH_VERSION" ;;
    esac
}

# The base Python, in BASE_PYTHON: CPython 3.10 to 3.13 that can make virtual environments. A name on the PATH is
# tried, not trusted: shims of version managers exist for versions that do not run.
find_python() {
    local name no_venv=
    for name in $PYTHON; do
        "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            BASE_PYTHON=$name
            return
        fi
        no_venv=$name
    done
    [ -z "$no_venv" ] || die no_venv "$no_venv"
    die no_python "$PYTHON"
}

has_gpu() {
    command -v nvidia-smi >/dev/null && timeout 30 nvidia-smi -L 2>/dev/null | grep -q GPU
}

# Does the index $1 list torch? The thread bounds the whole question, name look-up included.
answers() {
    "$BASE_PYTHON" - "${1%/}/torch/" "$PROBE_S" 2>/dev/null <<'EOP'
import os, sys, threading, urllib.request
url, limit_s = sys.argv[1], float(sys.argv[2])
def ask():
    with urllib.request.urlopen(url, timeout=limit_s) as reply:
        reply.read(1)
    os._exit(0)
thread = threading.Thread(target=ask, daemon=True)
thread.start()
thread.join(limit_s)
os._exit(1)
EOP
}

# PLACE (cpu or default), PLACE_DISK_GB and WHY: where all three torch packages come from.
choose_place() {
    local shown
    shown=${TORCH_INDEX_URL/\/\/*@///} # without a password
    PLACE=default PLACE_DISK_GB=$DEFAULT_DISK_GB
    if has_gpu; then
        WHY=$(text why_gpu)
    elif [ -z "$TORCH_INDEX_URL" ]; then
        WHY=$(text why_not_asked)
    elif answers "$TORCH_INDEX_URL"; then
        PLACE=cpu PLACE_DISK_GB=$CPU_DISK_GB
        WHY=$(text why_answers "$shown")
    else
        WHY=$(text why_silent "$shown" "$PROBE_S")
    fi
}

# An environment that runs and was made for this very path, or the one that a link leads to (scripts inside name it, so
# a moved one is broken).
usable() {
    "$VENV_PYTHON" -c 'import pip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null &&
        grep -qF -e "$VENV" -e "$(cd -P "$VENV" && pwd)" "$VENV/bin/activate"
}

# What the stamp records: digests of the requirement files and of constraints.txt (or that it was left out), versions of Python and of the three torch packages.
state() {
    "$VENV_PYTHON" - "$LATEST" <<'EOP'
import hashlib, importlib.metadata, pathlib, platform, sys
def digest(*names):
    return hashlib.sha256(b"\0".join(pathlib.Path(name).read_bytes() for name in names)).hexdigest()
print("requirements=" + digest("requirements.txt", "requirements-embeddings.txt", "requirements-towers.txt"))
print("dev=" + digest("requirements-dev.txt"))
print("constraints=" + ("none" if sys.argv[1] == "yes" else digest("constraints.txt")))
print("python=" + platform.python_version())
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
print("torch=" + " ".join(found.get(name, "none") for name in ("torch", "torchvision", "torchaudio")))
EOP
}

# Are the three torch packages there, from one place, in range, of the version asked for, and fit for this machine?
torch_stays() {
    local gpu=no
    if has_gpu; then gpu=yes; fi
    "$VENV_PYTHON" - "$TORCH_VERSION" "$gpu" <<'EOP'
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
wanted, gpu = sys.argv[1:]
lines = [Requirement(line.split("#")[0]) for line in open("requirements.txt") if line.startswith("torch")]
try:
    versions = {line.name: importlib.metadata.version(line.name) for line in lines}
except importlib.metadata.PackageNotFoundError:
    sys.exit(1)
builds = {version.partition("+")[2] for version in versions.values()}
stays = len(builds) == 1 and all(line.specifier.contains(versions[line.name]) for line in lines)
stays &= wanted in ("", versions["torch"], versions["torch"].partition("+")[0])
sys.exit(not stays or (gpu == "yes" and builds == {"cpu"}))
EOP
}

complete() {
    local line now
    [ -f "$STAMP" ] && usable && torch_stays && now=$(state) || return 1
    while read -r line; do
        case $DEV$line in
            nodev=*) continue ;;
            *constraints=*) [ "$LATEST" = yes ] || ! grep -qx constraints=none "$STAMP" || continue ;;
        esac
        grep -qxF "$line" "$STAMP" || return 1
    done <<<"$now"
}

check_disk() {
    local folder=$VENV free_gb
    while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
    free_gb=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    say disk "$1" "$folder" "$free_gb"
    [ "$free_gb" -ge "$1" ] || die no_disk
}

ask_pip() {
    local quiet=
    [ -t 1 ] || quiet=--quiet
    "$VENV_PYTHON" -m pip install ${quiet:+"$quiet"} --disable-pip-version-check "$@"
}

pip_install() {
    ask_pip "$@" || {
        say pip_failed "$*" >&2
        [ "$PLACE" != cpu ] || say without_index >&2
        exit 1
    }
}

# Packages in the versions that were tested together, torch's aside: those stay as install_torch has left them.
install_tested() {
    local tested=$VENV/constraints.txt
    if [ "$LATEST" = no ]; then
        grep -v '^torch' constraints.txt >"$tested"
        ask_pip -c "$tested" "$@" && return
        say not_tested
    fi
    pip_install "$@"
}

# The torch packages of constraints.txt; fails where others are wanted, or these are not available.
tested_torch() { # $@: options of pip
    local spec specs=()
    if [ -n "$TORCH_VERSION" ] || [ "$LATEST" = yes ]; then return 1; fi
    while read -r spec; do specs+=("$spec"); done < <(grep '^torch' constraints.txt)
    ask_pip "$@" "${specs[@]}" && return
    say torch_not_tested
    return 1
}

# All three from one place: a CPU-only torch beside the default index's torchvision does not even import.
install_torch() {
    local spec specs=() index=()
    "$VENV_PYTHON" -m pip uninstall --quiet --yes torch torchvision torchaudio 2>/dev/null
    if [ "$PLACE" = cpu ]; then index=(--index-url "$TORCH_INDEX_URL"); fi
    if ! tested_torch ${index[@]+"${index[@]}"}; then
        while read -r spec; do specs+=("$spec"); done < <(sed -n 's/[[:space:]]*#.*//; /^torch/p' requirements.txt)
        # === refuses another build (X+cpu) of the same version, from find-links say
        if [ -n "$TORCH_VERSION" ] && [ "$PLACE" = cpu ]; then specs+=("torch==$TORCH_VERSION"); fi
        if [ -n "$TORCH_VERSION" ] && [ "$PLACE" != cpu ]; then specs+=("torch===$TORCH_VERSION"); fi
        pip_install ${index[@]+"${index[@]}"} "${specs[@]}"
    fi
    if [ "$PLACE" = default ] && ! torch_stays; then
        read -r -a specs <<<"$(state | sed -n 's/^torch=//p')"
        say other_builds "${specs[*]}"
        pip_install "torch===${specs[0]%+*}" "torchvision===${specs[1]%+*}" "torchaudio===${specs[2]%+*}"
    fi
}

verify() {
    torch_stays || die torch_apart "$(state | grep ^torch=)" "$VENV"
    "$VENV_PYTHON" - <<'EOP' || die no_import "$VENV"
import platform, torch, torchaudio, torchvision
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device in reach"
print(f"setup: Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__},"
      f" torchaudio {torchaudio.__version__}; {device}")
EOP
}

# One that this script finished has its stamp in it, and is emptied. Any other may be the user's, and is kept, and of a
# link, which may lead to one that is in use elsewhere, the link alone makes way.
make_environment() {
    local aside
    if [ -d "$VENV" ] && [ -n "$(ls -A "$VENV")" ]; then
        [ -f "$VENV/pyvenv.cfg" ] || die no_environment "$VENV"
        say made_anew "$VENV_DIR"
        if [ ! -f "$STAMP" ] || [ -L "$VENV" ]; then
            aside=$VENV.before_$(date +%Y%m%d_%H%M%S)
            if [ -e "$aside" ] || ! mv "$VENV" "$aside"; then die no_rename "$VENV"; fi
            say kept_aside "$aside"
        fi
    fi
    "$BASE_PYTHON" -m venv --clear "$VENV"
}

install() {
    local dev
    usable || make_environment
    torch_stays || install_torch
    install_tested -r requirements.txt
    pip_install --no-deps --require-hashes -r requirements-embeddings.txt -r requirements-towers.txt
    if [ "$DEV" = yes ]; then
        install_tested -r requirements-dev.txt
        dev=$(state | grep '^dev=')
    else
        dev=$(grep -s '^dev=' "$STAMP" || true)
    fi
    verify
    { state | grep -v '^dev=' && echo "$dev"; } >"$STAMP.new" && mv "$STAMP.new" "$STAMP"
}

main() {
    parse "$@"
    case $VENV_DIR in /*) VENV=$VENV_DIR ;; *) VENV=$PWD/$VENV_DIR ;; esac
    VENV=${VENV%/}
    PLACE=kept VENV_PYTHON=$VENV/bin/python STAMP=$VENV/setup_environment.stamp
    if complete && [ "$DRY_RUN" = no ]; then
        say nothing_to_do "$VENV_DIR" "$(grep ^torch= "$STAMP")"
        return
    fi
    find_python
    say environment "$("$BASE_PYTHON" -V)" "$BASE_PYTHON" "$VENV_DIR"
    if usable && torch_stays; then
        say torch_stays "$(state | grep ^torch=)" && check_disk 1
    else
        choose_place
        say torch_from "${TORCH_VERSION:+$TORCH_VERSION }" "$PLACE" "$WHY" && check_disk "$PLACE_DISK_GB"
    fi
    if [ "$DRY_RUN" = yes ]; then
        if complete; then say dry_nothing; else say dry_install; fi
        return
    fi
    install
    say set_up "$VENV_DIR"
}

cd -P "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck disable=SC1091 # a file of its own, which is checked as such
source trimodal/messages.sh
main "$@"
