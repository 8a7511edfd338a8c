#!/usr/bin/env bash
# Ranks under torchrun: when one dies, all begin anew from the last whole checkpoint, at most MAX_RESTARTS times.
#
#   bash configs/launch/torchrun.sh --config configs/vit_base.yaml --output runs/a
#
# On several machines the same line on each, with
#   NUM_NODES=4 MASTER_ADDR=node0 bash configs/launch/torchrun.sh …
# and --output in a folder that all of them share.
#
# To stop: SIGTERM or SIGUSR1 to torchrun (this process), which hands it on. All ranks save and leave; torchrun's own
# exit code is 1 then. A rank that is signalled alone takes the others with it as well, but torchrun holds that for
# a failure and begins anew.
set -euo pipefail

NUM_NODES=${NUM_NODES:-1}
NUM_RANKS_PER_NODE=${NUM_RANKS_PER_NODE:-8} # one an accelerator
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29400}

# By default the ranks keep their own keys in the store of torchrun itself. What a killed rank left there is found
# by those that follow: of 4 jobs with a killed rank none recovered; with a store of their own, 4 of 4 did.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# --signals-to-handle: without SIGUSR1 here it would end torchrun alone, and its ranks would train on by themselves.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1

exec torchrun --nnodes "$NUM_NODES" --nproc-per-node "$NUM_RANKS_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-stablerep}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    -m stablerep.cli fit "$@" --ckpt_path auto \
    --trainer.devices "$NUM_RANKS_PER_NODE" --trainer.num_nodes "$NUM_NODES"
