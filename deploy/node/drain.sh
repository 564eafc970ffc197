#!/usr/bin/env bash
# Leaves a cluster without losing work. Kubernetes, compose and spot_notice.sh call it before a node goes.
#
#   drain.sh worker [SECONDS]   drains this node (training writes a checkpoint) and waits until its workers left
#   drain.sh head [SECONDS]     stops the commands of Patchloom on this node (each writes a checkpoint) and waits
#
# SECONDS is how long the node still lives (default: 90). The exit code is 0 also when the time is up.
set -uo pipefail

role=${1:?worker or head}
seconds=${2:-90}
commands='(bin/|-m )patchloom ' # `patchloom COMMAND`, and `python -m patchloom COMMAND` of `patchloom launch`

busy() {
    case $role in
    head) pgrep -f "$commands" ;;
    # Ray names processes by what they run; those that have nothing to do are ray::IDLE and the two agents
    worker) pgrep -fa '^ray::' | grep -v -e 'ray::IDLE' -e 'Agent' ;;
    esac >/dev/null
}

case $role in
head) pkill -TERM -f "$commands" || true ;;
worker)
    ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the node will be removed" \
        --deadline-remaining-seconds "$seconds" || true
    ;;
*)
    echo "drain.sh: '$role' is neither worker nor head" >&2
    exit 2
    ;;
esac
end=$((SECONDS + seconds))
while busy && [ "$SECONDS" -lt "$end" ]; do sleep 1; done
exit 0
