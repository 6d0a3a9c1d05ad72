# shellcheck shell=bash
# Sourced: makes and activates .venv unless an environment is active, and installs a requirements file.
#   source launch/environment.sh requirements.txt

if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  source .venv/bin/activate
fi
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.installed-$1"
wanted=$(cat requirements.txt "$1")
if [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
  echo "installing $1"
  # Of pip's lines: how many packages are there so far, with the size of each that has 10 MB or more.
  pip install --disable-pip-version-check --progress-bar=off -r "$1" | awk '
    /^ *(Downloading|Using cached|Processing) / { packages++ }
    /\([0-9.]+ [GM]B\)$/ && $(NF - 1) !~ /^\([0-9]\./ {
      sub(/.*\//, "", $(NF - 2))
      print "  " packages " packages, " substr($(NF - 1), 2) " " substr($NF, 1, 2) " " $(NF - 2); fflush()
    }
    /^Installing collected packages/ { print "  " packages " packages: unpacking them, a minute or two"; fflush() }'
  echo "$wanted" > "$stamp"
fi
