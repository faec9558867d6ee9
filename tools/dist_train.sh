#!/usr/bin/env bash
# Train and prune with several processes on this machine, one a GPU (on a CPU: one a core).
#
#   tools/dist_train.sh CONFIG N [options of tools/train.py]
#
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT as torchrun takes them.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
config=$1 processes=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
