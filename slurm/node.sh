#!/bin/bash
# shellcheck disable=SC2317  # the trap calls pass_on
# Runs a command on one node, and passes SIGUSR1 and SIGTERM on, as SIGUSR1, to the processes that do the work: those that have
# started no others. For commands that would end at once and take their ranks along. The other scripts call it:
#
#   bash node.sh COMMAND...

export PET_NODE_RANK=${SLURM_NODEID:-0} # torchrun's --node-rank
signals=0 pid=''

pass_on() {
    local child children
    children=$(pgrep -P "$1") || { kill -USR1 "$1" && return; }
    for child in $children; do pass_on "$child"; done
}

trap 'signals=$((signals + 1)); [[ ! $pid ]] || pass_on "$pid"' USR1 TERM
"$@" &
pid=$!
before=-1
while ((before != signals)); do # a signal ends `wait`, not the command
    before=$signals
    wait "$pid"
    status=$?
done
exit "$status"
