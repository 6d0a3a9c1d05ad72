#!/usr/bin/env bash
# Trains with N processes on this machine, or evaluates with COMMAND=evaluate.
#   bash launch/local.sh N [flags of prom_jax.train]
# GPUs are divided evenly among the processes. On a CPU, JAX_NUM_CPU_DEVICES=4 makes each look like 4 devices:
#   JAX_NUM_CPU_DEVICES=4 bash launch/local.sh 2 --config=configs/demo.py --workdir=runs/two
# Each line of output begins with its process. The exit status is that of process 0, or the first other that is not 0.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.txt

number=${1:?"how many processes? bash launch/local.sh N [flags of prom_jax.train]"}
shift
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
share=$((gpus / number))

# Each line as soon as it is there.
prefixed() {
  while IFS= read -r line || [ -n "$line" ]; do printf '%s: %s\n' "$1" "$line"; done
}

processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true' TERM INT # they save, and end
for ((id = 0; id < number; id++)); do
  if [ "$share" -gt 0 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((id * share)) $(((id + 1) * share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  python -u -m "prom_jax.${COMMAND:-train}" --coordinator="localhost:$port" --num_processes="$number" --process_id="$id" \
    "$@" > >(prefixed "$id") 2> >(prefixed "$id" >&2) &
  processes+=($!)
done

result=0
for id in "${!processes[@]}"; do
  while true; do # a signal interrupts wait
    status=0
    wait "${processes[$id]}" || status=$?
    kill -0 "${processes[$id]}" 2>/dev/null || break
  done
  [ "$status" = 0 ] || echo "process $id ended with status $status" >&2
  [ "$result" != 0 ] || result=$status
done
exit "$result"
