#!/usr/bin/env bash
#SBATCH --job-name=fedknow
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# A simulation on Slurm, with a Ray cluster of its own on the job's nodes:
#
#   sbatch recipes/slurm.sh digits --set data.clients=100
#
# OUT is the run folder (runs/slurm). A job that is requeued resumes it. With IMAGE, an Apptainer image of
# docker/simulate.Dockerfile (apptainer build fedknow.sif docker-daemon://fedknow-simulate:latest), commands run
# in it; without, fedknow and ray must be on the PATH of every node. PORT is that of Ray's head.
set -euo pipefail

: "${SLURM_JOB_ID:?submit this script with sbatch}"
out="${OUT:-runs/slurm}"
# Another job's head may be on the same node.
port="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
cpus="${SLURM_CPUS_PER_TASK:-1}"
run=()
if [ -n "${IMAGE:-}" ]; then
  run=(apptainer exec --bind "$PWD" --pwd "$PWD" "$IMAGE")
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$head:$port"
export RAY_USAGE_STATS_ENABLED=0 FLWR_TELEMETRY_ENABLED=0

on() { # on NODE COMMAND...: run a command on one node, beside the others
  local node="$1"
  shift
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "${run[@]}" "$@"
}

on "$head" ray start --head --block --port="$port" --num-cpus="$cpus" --include-dashboard=false &
ray=("$!")
trap 'kill "${ray[@]}" 2>/dev/null || true' EXIT
for node in "${nodes[@]:1}"; do
  # Ray asks the head again until it answers.
  on "$node" ray start --block --address="$address" --num-cpus="$cpus" &
  ray+=("$!")
done

# Until the head answers, for two minutes.
for _ in $(seq 60); do
  if on "$head" ray health-check --address "$address" 2>/dev/null; then break; fi
  sleep 2
done

options=()
if [ -e "$out/config.toml" ]; then options=(--resume); fi
if [ "$#" = 0 ]; then set -- digits; fi
on "$head" fedknow simulate "$@" --set "engine.address=$address" --out "$out" "${options[@]}"
