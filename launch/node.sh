#!/usr/bin/env bash
# One node's torchrun, under a scheduler that may end one node alone:
#
#   launch/node.sh [torchrun's arguments] launch/train.py [recipe=NAME] run.dir=DIR [key=value ...]
#
# SIGTERM is passed to the node's ranks, not to torchrun: all ranks of the run end after the same
# step, and torchrun exits on every node within seconds. (A torchrun that receives SIGTERM itself
# keeps the others waiting for 5 minutes.)
# Exit code 0: the run is finished; 75: it is not, and the same command resumes it; another:
# torchrun failed. All nodes must share the folder run.dir.
set -u

settings=()
seen=
for word; do
    if [[ -n $seen ]]; then settings+=("$word"); fi
    if [[ $word == launch/train.py ]]; then seen=1; fi
done

stop=
trap 'stop=1' TERM
torchrun "$@" &
launcher=$!
alive() { kill -0 "$launcher" 2>/dev/null; }

# The signal ends the wait.
wait "$launcher"
while alive; do
    # Again after a minute, for ranks that were still starting.
    if [[ -n $stop ]]; then pkill -TERM --parent "$launcher"; fi
    for ((second = 0; second < 60; second++)); do
        if ! alive; then break; fi
        sleep 1
    done
done
wait "$launcher" || exit
python launch/finished.py "${settings[@]}"
