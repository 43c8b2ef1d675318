#!/usr/bin/env bash
# Start training on one node or on several, one process for each GPU (one where there is none).
#
#   launch/torchrun.sh [+experiment=NAME] [key=value ...]
#
# On several nodes, the same command on each of them, with the environment
#
#   NNODES=4                nodes
#   NODE_RANK=0 ... 3       this node's number
#   MASTER_ADDR=10.0.0.1    the address of node 0
#   MASTER_PORT=29500       a free port of node 0
#
# and, where they are not to be found, NPROC_PER_NODE (processes on this node), PYTHON (the
# interpreter) and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (the network device between the nodes).
set -euo pipefail

gpus() { nvidia-smi --list-gpus 2>/dev/null | grep -c . || true; }

if [[ "${NNODES:-1}" -gt 1 && -z "${MASTER_ADDR:-}" ]]; then
  echo "NNODES=$NNODES needs MASTER_ADDR, the address of node 0" >&2
  exit 2
fi
if [[ "${NNODES:-1}" -gt 1 && -z "${NODE_RANK:-}" ]]; then
  echo "NNODES=$NNODES needs NODE_RANK, this node's number from 0 on" >&2
  exit 2
fi

processes="${NPROC_PER_NODE:-$(gpus)}"
if [[ "$processes" == 0 ]]; then processes=1; fi

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --nproc_per_node "$processes" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${MASTER_PORT:-29500}" \
  -m mst_train "$@"
