#!/usr/bin/env bash
# Train with several processes, one for each GPU of a machine, on one machine or on several.
#
#   launch/torchrun.sh [+experiment=NAME] [GROUP=NAME ...] [key=value ...]
#
# On several machines, the same command on each. What differs from the defaults is in the environment:
#
#   NODES          machines (1)
#   NODE_RANK      this machine's number, from 0 on; needed with NODES > 1
#   MASTER_ADDR    the address of machine 0, as the others reach it, on a network that they have for
#                  themselves; needed with NODES > 1
#   MASTER_PORT    a free port of machine 0 (29500; one machine alone finds a free one)
#   PROCESSES      processes on this machine (its GPUs; 1 where there is none)
#   RESTARTS       how often all processes are started again after one has failed (0)
#   STOP_SECONDS   what SIGTERM or SIGUSR1 leaves for the step and the checkpoint (600)
#   PYTHON         the interpreter (the active environment's, else .venv's beside this folder)
#
# NODES and RESTARTS are the same on all machines. GLOO_SOCKET_IFNAME, and for GPUs NCCL_SOCKET_IFNAME,
# name the network device between them. One machine alone listens on its loopback device.
#
# The exit status is that of the processes; 143 or 138 after SIGTERM or SIGUSR1; 2 where something
# given here cannot be.
set -euo pipefail

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# need NAME VALUE SMALLEST LARGEST: a whole number without leading zeros, which bash takes for octal.
need() {
  if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
    fail "$1=$2 must be a whole number from $3 to $4"
  fi
}

count_gpus() {
  local devices=()
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t devices < <(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU ')
  fi
  echo "${#devices[@]}"
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python=${PYTHON:-}
if [[ -z $python && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $here/../.venv/bin/python ]]; then
  python=$here/../.venv/bin/python
  export PATH="$here/../.venv/bin:$PATH"  # DeepSpeed looks for ninja there
fi
python=${python:-python}
command -v "$python" >/dev/null || fail "there is no $python: set PYTHON to an interpreter"
"$python" -c 'import importlib.util as i; exit(not (i.find_spec("torch") and i.find_spec("mst_train")))' ||
  fail "$python does not find torch and mst_train: run make setup, or set PYTHON to the interpreter that has them"

nodes=${NODES:-1}
need NODES "$nodes" 1 100000
processes=${PROCESSES:-$(count_gpus)}
[[ -n ${PROCESSES:-} || $processes != 0 ]] || processes=1
need PROCESSES "$processes" 1 1024
need RESTARTS "${RESTARTS:-0}" 0 100000
need STOP_SECONDS "${STOP_SECONDS:-600}" 1 1000000
[[ -z ${MASTER_PORT:-} ]] || need MASTER_PORT "$MASTER_PORT" 1 65535

if ((nodes > 1)); then
  [[ -n ${NODE_RANK:-} ]] || fail "NODES=$nodes needs NODE_RANK, this machine's number from 0 on"
  [[ -n ${MASTER_ADDR:-} ]] || fail "NODES=$nodes needs MASTER_ADDR, the address of machine 0"
  need NODE_RANK "$NODE_RANK" 0 $((nodes - 1))
  rank=$NODE_RANK address=$MASTER_ADDR port=${MASTER_PORT:-29500}
elif [[ ${NODE_RANK:-0} != 0 ]]; then
  fail "NODE_RANK=$NODE_RANK is for several machines: set NODES to their number"
else
  rank=0 address=127.0.0.1 port=${MASTER_PORT:-0} # 0: any free one
fi

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  share=$(($(getconf _NPROCESSORS_ONLN) / processes))
  export OMP_NUM_THREADS=$((share > 0 ? share : 1))
fi
exec "$python" "$here/torchrun.py" "$nodes" "$rank" "$address" "$port" "$processes" \
  "${RESTARTS:-0}" "${STOP_SECONDS:-600}" -m mst_train "$@"
