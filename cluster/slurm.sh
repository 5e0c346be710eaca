#!/usr/bin/env bash
# sbatch [OPTIONS] cluster/slurm.sh STAGE ARGUMENTS...      one stage on a Ray of the job's own
#
#   sbatch --nodes=4 cluster/slurm.sh denoise --model places64 --images /scratch/me/scans \
#       --out /scratch/me/cleaned
#
# From the top of the repository, with snr's environment active (sbatch passes it on). Paths are
# absolute and on storage that all nodes mount. After a time limit or a lost node Slurm starts the
# same command anew, which continues.
#SBATCH --job-name=snr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

(($# > 0)) || { echo "slurm.sh: name a stage and its arguments, as for snr." >&2; exit 2; }
command -v ray >/dev/null || {
    echo "slurm.sh: Ray is needed, but no ray is on the PATH; activate snr's environment and" \
        "submit again." >&2
    exit 2
}

# One token for this job, in a file that only its owner reads, on the home that nodes share.
umask 077
token=$HOME/.snr-ray-token-$SLURM_JOB_ID
trap 'rm -f "$token"' EXIT
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token
# A node that is cut off is given up after 25 seconds instead of 7 minutes.
export RAY_grpc_client_keepalive_time_ms=15000 RAY_grpc_client_keepalive_timeout_ms=10000

nodes=$SLURM_JOB_NUM_NODES
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # which reads on, so that none writes to a closed pipe
# By number, as names of nodes may lead to the loopback of the node itself.
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I | cut -d ' ' -f 1)
# Jobs that share a node differ in their port, below those that Ray gives to workers.
export RAY_ADDRESS=$address:$((6400 + SLURM_JOB_ID % 2000))

# Ray's files lie in a folder that only its owner enters, on each node.
srun --nodes="$nodes" --ntasks="$nodes" bash -c '
    closed=/tmp/snr-ray-$(id -u)-$SLURM_JOB_ID
    rm -rf "$closed" && mkdir -m 700 "$closed"
    trap "rm -rf $closed" EXIT
    ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --temp-dir="$closed/ray" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --disable-usage-stats \
        -- snr "$@"
' slurm.sh "$@"
