#!/bin/bash
# Submits a training and what follows it, each with the right dependency: training -> evaluation (an array of jobs) -> merge and
# report, and training -> conversions. If a job fails, those that wait for it are canceled.
#
#   slurm/submit.sh RECIPE [options] [-- options of sbatch for the training]
#   slurm/submit.sh recipes/demo.yaml --nodes 2 --ntasks-per-node 4 --convert en-de --convert de-en:huggingface -- --time=8:00:00
#
#   --nodes N              nodes of the training (2)
#   --ntasks-per-node N    its ranks on each node, one for each GPU (2)
#   --cpus-per-task N      cores of each rank, and of each evaluation and conversion (1)
#   --array N              jobs that share the evaluation (8)
#   --beam N               of the evaluation (5)
#   --convert A-B[:KIND]   takes out a direction's sub-network, as KIND: dense, huggingface, ctranslate2 (the default) or hybrid; may
#                          be repeated; written to RUN-A-B-KIND
#   --set KEY=VALUE        changes a key of the recipe; may be repeated
#   --out DIR              the run folder (runs/NAME, or that of the run whose recipe.yaml is given)
#   --test-only            asks SLURM whether it would take the jobs, and submits none
#
# It needs prepared data (lsmoe data prepare), lsmoe and sbatch; partition, account and the like stand in site.sh. To be called in the
# folder that relative paths are meant from; logs go to logs/ in it. LAUNCH=torchrun and the like go on to train.sbatch.

set -Eeuo pipefail

refuse() {
    echo "lsmoe: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

nodes=2 ranks=2 cpus=1 parts=8 beam=5 recipe='' out='' test_only='' changes=() conversions=() more=()
while (($#)); do
    case $1 in
    --nodes | --ntasks-per-node | --cpus-per-task | --array | --beam)
        [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$1 is '${2:-}': it should be a whole number from 1 on"
        case $1 in --nodes) nodes=$2 ;; --ntasks-per-node) ranks=$2 ;; --cpus-per-task) cpus=$2 ;; --array) parts=$2 ;; --beam) beam=$2 ;; esac
        shift 2
        ;;
    --convert)
        [[ ${2:-} =~ ^[^-:]+-[^-:]+(:(dense|huggingface|ctranslate2|hybrid))?$ ]] ||
            refuse "--convert is '${2:-}': it should be A-B or A-B:KIND, KIND dense, huggingface, ctranslate2 or hybrid"
        conversions+=("$2")
        shift 2
        ;;
    --set | --out)
        (($# >= 2)) || refuse "$1 lacks its value"
        if [[ $1 == --out ]]; then out=$2; else changes+=(--set "$2"); fi
        shift 2
        ;;
    --test-only) test_only=yes && shift ;;
    --help | -h) usage ;;
    --) shift && more=("$@") && break ;;
    -*) refuse "there is no option $1: see $0 --help" ;;
    *)
        [[ ! $recipe ]] || refuse "'$1' is one recipe too many"
        recipe=$1 && shift
        ;;
    esac
done
[[ $recipe ]] || usage

LSMOE_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LSMOE_SLURM
set +u # modules and environments may ask for what is not set
# shellcheck source=site.sh source-path=SCRIPTDIR
source "$LSMOE_SLURM/site.sh"
set -u
command -v sbatch >/dev/null || refuse "sbatch is not found: submit from a machine of the cluster"
((${#CONTAINER[@]})) || command -v lsmoe >/dev/null ||
    refuse "lsmoe is not found: activate the environment that has it, or let $LSMOE_SLURM/site.sh do so, for the jobs as well"

# What no training could begin with is refused here, before it has waited in the queue.
planned=$("${CONTAINER[@]}" lsmoe plan "$recipe" "${changes[@]}" --world $((nodes * ranks)) --json) || exit 2
out=${out:-$(sed -n 's/^ "run": "\(.*\)",$/\1/p' <<<"$planned")}

if [[ ! $test_only ]]; then
    mkdir -p logs
    printf '%-10s %-26s %s\n' JOB NAME 'WAITS FOR'
fi

submitted=()
submit() { # NAME WAITS-FOR OPTIONS-SCRIPT-ARGUMENTS...: prints the job's line of the table and leaves its number in `job`
    local name=$1 after=$2 options=(--job-name="lsmoe-$1")
    shift 2
    if [[ $test_only ]]; then
        sbatch --test-only "${options[@]}" "$@"
        return
    fi
    [[ ! $after ]] || options+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable "${options[@]}" "$@")
    job=${job%%;*} # without the cluster's name
    submitted+=("$job")
    printf '%-10s %-26s %s\n' "$job" "$name" "${after:--}"
}

take_back() { # half a chain is of no use
    ((BASH_SUBSHELL == 0)) || exit 1 # told once, by the shell that knows all jobs
    ((${#submitted[@]} == 0)) || scancel "${submitted[@]}"
    refuse "sbatch has not taken all jobs: none is left in the queue"
}
trap take_back ERR

job='' one=(--output='logs/%x-%j.out' --cpus-per-task="$cpus" ${SBATCH_GPUS_PER_NODE:+--gpus-per-node=1}) # for jobs of one process
submit train '' --output='logs/%x-%j.out' --nodes="$nodes" --ntasks-per-node="$ranks" --cpus-per-task="$cpus" "${more[@]}" \
    "$LSMOE_SLURM/train.sbatch" "$recipe" "${changes[@]}" --out "$out"
train=$job
submit evaluate "$train" "${one[@]}" --output='logs/%x-%A_%a.out' --array="1-$parts" "$LSMOE_SLURM/evaluate.sbatch" "$out" --beam "$beam"
submit merge "$job" "${one[@]}" "$LSMOE_SLURM/merge.sbatch" "$out" "$parts" --beam "$beam"
for each in "${conversions[@]}"; do
    direction=${each%%:*} kind=ctranslate2
    [[ $each == "$direction" ]] || kind=${each#*:}
    submit "convert-$direction" "$train" "${one[@]}" \
        "$LSMOE_SLURM/convert.sbatch" "$out" "${direction%-*}" "${direction#*-}" "$kind" "$out-$direction-$kind"
done
[[ ! $test_only ]] || exit 0

cat <<END

follow:   tail -F logs/lsmoe-train-$train.out     and: squeue --me
cancel:   scancel ${submitted[*]}
If a job fails, those that wait for it are canceled (DependencyNeverSatisfied). Why it failed:   grep lsmoe: logs/lsmoe-train-$train.out
END
