#!/usr/bin/env bash
# The tests against the lowest or the newest versions that pyproject.toml allows, in an environment of their own.
#   bash tests/versions.sh lowest|newest python3.11 [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) echo "error: tests/versions.sh ${1:-}: expected lowest or newest, and a Python" >&2 && exit 2 ;;
esac
python=${2:?"which Python? bash tests/versions.sh lowest python3.11"}
shift 2

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"
source "$environment/bin/activate"
pip install --quiet --disable-pip-version-check uv
# What the tests need besides.
grep --extended-regexp "^(torch|peft|accelerate|tokamax|gcp-storage-emulator|pytest|pytest-xdist|hypothesis|nbclient|ipykernel|build|twine)==" \
  requirements-dev.txt > "$environment/tools.in"
uv pip compile --quiet --no-annotate --resolution="$resolution" --extra=all \
  --output-file="$environment/versions.txt" pyproject.toml "$environment/tools.in" > /dev/null
pip install --quiet --disable-pip-version-check --no-compile -r "$environment/versions.txt"
source launch/model.sh smollm2
export SMOLLM2
python -m pytest "$@"
