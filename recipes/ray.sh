#!/usr/bin/env bash
# A Ray cluster: one driver lists the source and hands out shards, an actor a GPU mines them. Ray runs the driver on the head
# node, which should be no spot machine: if it dies, submit the job again; finished shards stay.
#
#   ray job submit needs the cluster's address: RAY_API_SERVER_ADDRESS=http://HEAD:8265 bash recipes/ray.sh
#
# Without a cluster, `datalth-mine --ray ...` alone starts one on this machine, with an actor for each of its GPUs.
# datalth is in the image of the nodes: that of kubernetes.yaml, FROM rayproject/ray:...-gpu, with '/datalth[ray,s3,fast]'. The
# store's keys are in the nodes' environment, or their machines may use the store anyway.
set -euo pipefail

# --- edit
DATA='s3://bucket/photos/*.tar'
OUT=s3://bucket/shards            # or a folder that all nodes see
# ---

# Where GPU nodes are started only on demand (autoscaling), add --device cuda -j 8: what a worker takes is else decided by the
# nodes that are there now.
# --no-wait: the job goes on without this shell; `ray job logs -f` shows its progress.
exec ray job submit --no-wait -- datalth-mine --ray auto --data "$DATA" --out "$OUT" --amp
