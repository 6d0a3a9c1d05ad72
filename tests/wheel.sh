#!/usr/bin/env bash
# The wheel: built, checked with twine, and complete. With `install` it is also installed, with the core dependencies
# alone and then with all extras, in clean environments of the Pythons named, and used from outside the repository:
#   bash tests/wheel.sh [install python3.11 python3.12 …]
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a copy, as building leaves folders behind.
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from=- | tar --extract --directory="$work"
python -m build --no-isolation --wheel --outdir="$work/dist" "$work" > "$work/log" || { cat "$work/log" && false; }
wheel=$(echo "$work"/dist/*.whl)
python -m twine check --strict "$wheel"
python - "$wheel" <<'PYTHON'
import subprocess, sys, zipfile

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
wanted = {name for name in tracked if name.startswith("prom_jax/") and name != "prom_jax/resources/configs"}
wanted |= {f"prom_jax/resources/{name}" for name in tracked if name.startswith("configs/")}
sys.exit(f"the wheel lacks {sorted(wanted - names)}" if wanted - names else 0)
PYTHON
echo "the wheel is complete"

[ "${1:-}" = install ] || exit 0
shift
source launch/model.sh smollm2
cd "$work"
for python; do
  "$python" -m venv "$work/venv"
  for extras in "" "[all]"; do
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$wheel$extras"
    "$work/venv/bin/pip" check
    "$work/venv/bin/prom-jax" generate --model="$SMOLLM2" --max_new_tokens=5 "Habari?"
    if [ -n "$extras" ]; then
      "$work/venv/bin/prom-jax" train --config=demo --config.model="$SMOLLM2" --config.steps=2 \
        --config.pivot.regulate=never --config.eval.samples=0 --workdir="$work/run"
    else
      ! "$work/venv/bin/prom-jax" train --config=demo || false
    fi
  done
  echo "$("$work/venv/bin/python" --version): the wheel works alone and with all extras"
  rm -r "$work/venv" "$work/run"
done
