#!/usr/bin/env bash
#SBATCH --job-name=patchloom
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=patchloom-%j.log
#
# Trains on the nodes of one Slurm job: starts Ray on all of them, trains, and continues in a new job when time is up.
#
#   sbatch deploy/slurm.sh celeba64 --data /shared/pixels --out /shared/runs/one
#   sbatch --nodes=4 --time=8:00:00 deploy/slurm.sh my.yaml --data s3://BUCKET/latents --out s3://BUCKET/runs/one
#
# Its arguments are those of `patchloom train`; it adds --workers (one per GPU), --wait (for nodes that start slowly) and
# --resume, which begins the run, or continues it from its newest checkpoint. So the same command is right at any time.
#
#   300 s before the time limit   a checkpoint is written, and the job goes back to the queue (exit code 143 inside)
#   --max-hours H                 the same after H hours, where a site does not send signals
#   a node is lost                Slurm requeues the job
#   scancel --batch --signal=TERM JOB    a checkpoint is written, and the job ends. Without --batch, Slurm stops all
#                                 processes at once, and work since the last checkpoint is lost
#
# Set before sbatch: PATCHLOOM_VENV, a virtual environment that all nodes see (default: .venv in the folder of sbatch);
# MLFLOW_TRACKING_URI, an MLflow server that all nodes reach; PATCHLOOM_HEAD_ADDRESS, if the first address that
# `hostname -I` prints is not the one that other nodes reach.
#
# Run for this version on Slurm 22.05 with two nodes (two slurmd on one machine, without GPUs): trained, stopped by the
# time limit, requeued, continued and finished.
set -uo pipefail

venv=${PATCHLOOM_VENV:-$SLURM_SUBMIT_DIR/.venv}
export PATH=$venv/bin:$PATH
nodes=$SLURM_JOB_NUM_NODES
address=${PATCHLOOM_HEAD_ADDRESS:-$(hostname -I | awk '{print $1}')}
port=$((20000 + SLURM_JOB_ID % 10000 * 4))
export nodes address port
export RAY_ADDRESS=$address:$port # for patchloom
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN # of this job only; srun gives it to every node
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))') || exit 1

# shellcheck disable=SC2329  # srun calls it
node() { # runs on every node; the first one is also the head
    ulimit -n 65536 2>/dev/null
    local options=(--block --num-cpus="$SLURM_CPUS_ON_NODE")
    if [ "$SLURM_NODEID" = 0 ]; then
        exec ray start --head "${options[@]}" --disable-usage-stats --node-ip-address="$address" --port="$port" \
            --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) --temp-dir="/tmp/ray-$SLURM_JOB_ID"
    fi
    for _ in {1..60}; do # until the head answers
        ray health-check --address="$address:$port" >/dev/null 2>&1 && break
        sleep 2
    done
    exec ray start "${options[@]}" --address="$address:$port"
}
export -f node

stopped=0
training=0
trap 'stopped=1; [ "$training" = 0 ] || kill -TERM "$training"' TERM
trap '[ "$training" = 0 ] || kill -TERM "$training"' USR1 # what --signal above sends before the time limit

# One task per node, with all CPUs and GPUs of the job there. A node that fails ends the step, and with it the job.
srun --nodes="$nodes" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 bash -c node &
cluster=$!
for _ in {1..90}; do
    ray health-check --address="$RAY_ADDRESS" >/dev/null 2>&1 && break
    kill -0 "$cluster" 2>/dev/null || break
    sleep 2
done

patchloom train "$@" --workers $((nodes * ${SLURM_GPUS_ON_NODE:-1})) --wait 10 --resume &
training=$!
while :; do # a signal ends `wait` before the training ends
    wait "$training"
    code=$?
    kill -0 "$training" 2>/dev/null || break
done
wait "$training" 2>/dev/null
again=$? # 127: the exit code was already given above
[ "$again" = 127 ] || code=$again

kill -TERM "$cluster" 2>/dev/null
wait "$cluster"
if [ "$code" = 0 ] || [ "$code" = 143 ]; then # after a failure, the logs of Ray stay
    srun --nodes="$nodes" --ntasks-per-node=1 rm -rf "/tmp/ray-$SLURM_JOB_ID"
fi
if [ "$code" = 143 ] && [ "$stopped" = 0 ]; then
    echo "a checkpoint is written: the job goes back to the queue and continues"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
