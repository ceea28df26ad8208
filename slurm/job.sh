# shellcheck shell=bash disable=SC2034
# What all jobs share. The .sbatch files source it inside a job; it is not run by hand.
#
# It reads site.sh, gives the job node-local folders for caches and sockets, and has the functions by which a job tells its ranks to
# save and puts itself back into the queue. The ranks compile nothing: DeepSpeed's extensions are not used.

set -eo pipefail
LSMOE_SLURM=${LSMOE_SLURM:-$SLURM_SUBMIT_DIR/slurm} # this folder; sbatch runs a copy of the script elsewhere
# shellcheck source=site.sh source-path=SCRIPTDIR
source "$LSMOE_SLURM/site.sh"
set -u

LSMOE=("${CONTAINER[@]}" lsmoe)
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # the number alone may stand for the whole array
JOB=${JOB:-$SLURM_JOB_ID}

say() { echo "lsmoe: $*" >&2; }

usage() { # prints the head of the script, and leaves
    sed -n '2,/^$/{/^#SBATCH/!s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

on_every_node() { # COMMAND...: once on each node
    if ((${SLURM_NNODES:-1} == 1)); then
        "$@"
    else
        timeout 30 srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 "$@"
    fi
}

clean() {
    trap - EXIT
    on_every_node rm -rf "$TMPDIR" 2>/dev/null || say "nodes may have kept $TMPDIR"
}

export TMPDIR=$NODE_LOCAL/lsmoe-$SLURM_JOB_ID
export TORCH_EXTENSIONS_DIR=$TMPDIR/extensions TRITON_CACHE_DIR=$TMPDIR/triton TORCHINDUCTOR_CACHE_DIR=$TMPDIR/inductor
export CUDA_CACHE_PATH=$TMPDIR/cuda MPLCONFIGDIR=$TMPDIR/matplotlib
on_every_node mkdir -p -m 700 "$TMPDIR"
trap clean EXIT

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it from the job
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# --- A training that can be asked to stop: SIGUSR1 comes before the time limit (--signal=B:USR1@...), SIGTERM when the job is
# preempted or canceled. Both go to this script, which must `wait` to hear them; the ranks are told, save, and leave.

stops=0 pid='' teller=''

hear_signals() { trap ask_to_stop USR1 TERM; } # to be called first of all

ask_to_stop() {
    stops=$((stops + 1))
    if [[ $pid ]]; then start_telling; fi
}

start_telling() {
    [[ ! $teller ]] || return 0
    keep_telling &
    teller=$!
}

keep_telling() { # again and again, as a rank that only starts does not hear
    say "job $JOB is asked to stop: telling its ranks to save"
    while kill -0 "$pid" 2>/dev/null; do
        tell_ranks 2>/dev/null || true
        sleep 10
    done
}

# What srun has started, on all nodes, and not this script. While the job ends scancel would try again for long, into its next attempt.
tell_ranks() { timeout 4 scancel --signal=USR1 "$JOB"; }

# Before a command that is not to die of the signal while it has no handler yet.
SHIELD=(bash -c 'trap "" USR1; exec "$@"' shield)

run_ranks() { # COMMAND...: leaves its exit status in `status`
    status=75
    ((stops == 0)) || return 0
    "$@" &
    pid=$!
    ((stops == 0)) || start_telling
    local before=-1
    while ((before != stops)); do # a signal ends `wait`, not the command
        before=$stops status=0
        wait "$pid" || status=$?
    done
    [[ ! $teller ]] || kill "$teller" 2>/dev/null || true
    pid=''
}

leave() { # STATUS: ends the job; 75 puts it back into the queue, under its number
    clean
    (($1 == 75)) || exit "$1"
    local job='' ended=''
    trap '' USR1 TERM # the warning of the time limit would end the questions to slurmctld
    if ! insist show_job || [[ ! $job ]]; then
        say "slurmctld does not answer: job $JOB is not requeued; submit it anew, it goes on where it is"
        exit 75
    fi
    if ! may_requeue; then
        say "job $JOB was canceled, or is being requeued by SLURM: it is not requeued from here"
        exit 75
    fi
    trap 'ended=1' TERM # SLURM's, once it has requeued the job; scontrol may not have returned yet
    if ! insist scontrol requeue "$JOB"; then
        say "job $JOB could not be requeued: submit it anew, it goes on where it is"
        exit 75
    fi
    trap - TERM
    [[ ! $ended ]] || kill -TERM $$
    sleep 60 &
    wait $!
    say "job $JOB was requeued, but not ended: submit it anew, it goes on where it is"
    exit 75
}

insist() { # COMMAND...: again if it fails, as a busy slurmctld may not answer
    local pause
    for pause in 1 3 9; do
        ! "$@" || return 0
        sleep "$pause"
    done
    "$@"
}

show_job() { job=$(scontrol --oneliner show job "$JOB"); }

may_requeue() { # not what somebody has canceled
    [[ $job =~ JobState=RUNNING|Reason=TimeLimit|PreemptTime=[0-9] ]]
}
