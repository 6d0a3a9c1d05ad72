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
  pip install --quiet --disable-pip-version-check -r "$1"
  echo "$wanted" > "$stamp"
fi
