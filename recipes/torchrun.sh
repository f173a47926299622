#!/usr/bin/env bash
# Machines that are yours until the end: torchrun gives every rank its own shards, by number. No claims, no store that can do
# conditional writes, a shared folder is enough. A rank that dies stops all of them; run the script again and they go on.
# Where machines come and go, or are not equally fast, take --elastic (shells.sh, slurm.sbatch, kubernetes.yaml, skypilot.yaml).
#
#   bash recipes/torchrun.sh                                     # one machine
#   NODES=4 NODE=0 HEAD=node0 bash recipes/torchrun.sh           # on each of four: NODE=0, 1, 2, 3; HEAD is the name of the first
set -euo pipefail

# --- edit
DATA=/data/imagenet               # the same path on every machine
OUT=/shared/shards                # a folder that all of them see
GPUS=8                            # of each machine
CORES=8                           # threads a rank
# ---

# --max-restarts 3: after a rank has died all are started anew, up to three times; finished shards stay.
exec torchrun --no-python --max-restarts 3 \
    --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --master-addr "${HEAD:-localhost}" --master-port 29500 \
    --nproc-per-node "$GPUS" \
    datalth-mine --data "$DATA" --out "$OUT" --amp -j "$CORES"
