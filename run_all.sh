#!/usr/bin/env bash
# From an empty folder to a trained, evaluated and reported model; running it again skips what is done.
#
#   ./run_all.sh --demo                                               a small real data set, a tiny model, two CPU cores
#   ./run_all.sh --demo --pretrained                                  the same on pretrained towers of images and text
#   ./run_all.sh --demo --bilingual                                   the same with captions in Chinese and English
#   ./run_all.sh                                                      the full job: base, config.yaml's sets and epochs
#   ./run_all.sh --model-size base --batch-size 8 --epochs 50         any flags of run_training.py
#   ./run_all.sh --datasets coco clotho --data-root /big/disk/data    data sets and their folder
#   ./run_all.sh --config recipes/synthetic.yaml                      nothing to download: works offline once set up
#
# --demo stands for --config recipes/demo.yaml --model-size tiny; with --pretrained or --bilingual the recipe is
# recipes/demo_pretrained.yaml or recipes/demo_bilingual.yaml.
# --check, --plan and --doctor download no data and train nothing. Relative paths are relative to this folder. The
# variables of setup_environment.sh apply here too.
#
# Time:    the demo at most 15 minutes on two CPU cores after the installation; the full job needs a GPU.
# Disk:    the environment (setup_environment.sh) and the data (README.md lists each set's size).
# Network: for the installation and the data only.
set -euo pipefail

VENV_DIR=${VENV_DIR:-venv}
PYTHON_HERE=$VENV_DIR/bin/python

say() { echo "run_all: $(text "$@")"; } # KEY VALUES...: a sentence of trimodal/messages.sh
die() {
    say "$@" >&2
    exit 2
}
usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]##*/}"; }

given() { # is the flag $1 among the other arguments?
    local flag=$1 argument
    shift
    for argument in "$@"; do
        case $argument in "$flag" | "$flag="*) return 0 ;; esac
    done
    return 1
}

# Flags are read by any Python that is there, before minutes of set-up and hours of download. Where there is none, the
# set-up says which one it needs; settings are read after it.
check_flags() {
    local python
    for python in "$PYTHON_HERE" python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$python" -c 'import sys, run_training; run_training.parse(sys.argv[1:])' "$@"
            return
        fi
    done
}

newest_report() { # of the output folder $1: its page, or the text of an earlier release; nothing where there is none
    local file newest=
    for file in "$1"/reports/report_*.md; do
        if [ -f "$file" ] && { [ -z "$newest" ] || [ "$file" -nt "$newest" ]; }; then newest=$file; fi
    done
    if [ -f "${newest%.md}.html" ]; then newest=${newest%.md}.html; fi
    echo "$newest"
}

what_next() { # $1: output folder, $2: page of the report
    text report "$2"
    text checkpoints "$1"
    text curves "$1"
    text next "$VENV_DIR"
    text next_evaluate "$1"
    text next_plan
    text next_flags
}

how_to_search() { # $1: data folder, $2: output folder
    text search
    text search_index "$1" "$2" "$2"
    text search_query "$2"
    text search_serve "$2"
}

main() {
    local answers data_root output_dir names report flag fetched=0 recipe=demo is_demo=
    if given -h "$@" || given --help "$@"; then usage && return; fi
    if [ "${1-}" = --demo ]; then
        shift
        case ${1-} in
            --pretrained | --bilingual)
                recipe=demo_${1#--}
                shift
                ;;
        esac
        if given --config "$@"; then die demo_config; fi
        set -- --config "recipes/$recipe.yaml" --model-size tiny "$@"
        is_demo=yes
    fi
    if given --demo "$@"; then die demo_first; fi
    for flag in --pretrained --bilingual; do
        if given "$flag" "$@"; then die pretrained_second "$flag"; fi
    done
    check_flags "$@"

    say step_environment
    bash setup_environment.sh
    if given --check "$@" || given --plan "$@" || given --doctor "$@"; then exec "$PYTHON_HERE" run_training.py "$@"; fi
    if ! given --resume "$@" && ! given --overwrite "$@" && ! given --init "$@"; then set -- "$@" --resume auto; fi
    answers=$("$PYTHON_HERE" run_training.py --check "$@") # what training would refuse ends here
    { IFS= read -r data_root && IFS= read -r output_dir && read -r names; } <<<"$answers"

    say step_data "$names" "$data_root"
    # shellcheck disable=SC2086 # one word for each set
    "$PYTHON_HERE" download_datasets.py --datasets $names --data-root "$data_root" --skip-existing || fetched=$?
    if [ "$fetched" = 3 ]; then
        say data_in_part
    elif [ "$fetched" != 0 ]; then
        exit "$fetched"
    fi

    say step_training
    "$PYTHON_HERE" run_training.py "$@"

    say step_report
    report=$(newest_report "$output_dir")
    [ -n "$report" ] || die no_report "$output_dir" "$PYTHON_HERE" "$output_dir"

    say step_done
    what_next "$output_dir" "$report"
    if [ -n "$is_demo" ] && [[ " $names " = *" stamps "* ]]; then how_to_search "$data_root" "$output_dir"; fi
}

cd -P "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck disable=SC1091 # a file of its own, which is checked as such
source trimodal/messages.sh
main "$@"
