#!/usr/bin/env bash
# The tests, in an environment that has what they need; two files at a time, as most of a test is compiling.
#   bash tests/run.sh [arguments of pytest]     # -m slow: those on real weights, and faults at random moments
# Six minutes of tests on Gemma run where GEMMA3 is set:
#   GEMMA3=$(bash launch/model.sh gemma) bash tests/run.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements-dev.txt
source launch/model.sh smollm2
export SMOLLM2
exec python -m pytest --numprocesses=2 --dist=loadfile "$@"
