#!/usr/bin/env bash
# Adapts SmolLM2-135M, a 30-layer English-centric Llama, to Swahili with PROM, on whatever devices there are.
#   bash launch/demo.sh [flags of prom_jax.train]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.txt
source launch/model.sh smollm2
exec python -m prom_jax.train --config=configs/demo.py --config.model="$SMOLLM2" "$@"
