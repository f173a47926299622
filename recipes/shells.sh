#!/usr/bin/env bash
# One box, several shells: a worker a GPU, each in the background. They share nothing but the folder, so more may be started
# by hand in other shells, on other machines that see the folder, at any time; any of them may be killed at any time.
#
#   bash recipes/shells.sh            # again: goes on where it was stopped
set -uo pipefail

# --- edit
DATA=/data/imagenet               # a folder, tars, or s3://bucket/photos/*.tar (quoted)
OUT=shards                        # a folder, or s3://bucket/shards
GPUS=8
CORES=8                           # threads a worker; GPUS x CORES should not be more than the box has
# ---

# Ctrl-C and SIGTERM reach all workers: each gives back its shard, so that nobody has to wait until a claim is too old.
trap 'kill -TERM $(jobs -p) 2>/dev/null' INT TERM

for ((gpu = 0; gpu < GPUS; gpu++)); do
    CUDA_VISIBLE_DEVICES=$gpu datalth-mine --elastic --data "$DATA" --out "$OUT" --amp -j "$CORES" &
done

# Exit code 1 if a worker has failed; the others have then done its work, unless all of them failed.
failed=0
for worker in $(jobs -p); do wait "$worker" || failed=1; done
wait                              # a signal ends a wait before the worker ends
exit $failed
