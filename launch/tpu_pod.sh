#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice; JAX finds them by itself.
#   TPU=name ZONE=us-east5-a bash launch/tpu_pod.sh --config=configs/th.py --workdir=/mnt/shared/th
# On every host, the repository is expected in ~/prom_jax with an environment .venv that has the extra [tpu], and
# --workdir on storage that all hosts mount. PROJECT overrides the default project.
# The command runs again after a pre-emption or a fault (status 75 or 69); while the slice is away, it is tried for
# an hour.
set -uo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"

train="cd ~/prom_jax && source .venv/bin/activate && python -u -m prom_jax.train$(printf ' %q' "$@")"
tries=60
while [ "$tries" -gt 0 ]; do
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all \
    --command="$train"
  status=$?
  case $status in
    0 | 2) exit $status ;; # done; or a mistake, which would come again
    69 | 75) tries=60 ;;
    *) tries=$((tries - 1)) ;;
  esac
  echo "ended with status $status: again in a minute" >&2
  sleep 60
done
exit "$status"
