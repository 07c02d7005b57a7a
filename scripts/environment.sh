# Source this file: it creates .venv in the repository root if missing, installs requirements.txt and the packages in "$@"
# (with uv, or pip if uv is not available), and prepends .venv/bin to PATH.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "$PYTHON is $("$PYTHON" --version 2>&1), but 3.10 or newer is required; choose another: PYTHON=python3.12 bash $0" >&2
  exit 1
fi
if [ ! -x .venv/bin/python ]; then
  echo "creating .venv with $("$PYTHON" --version)"
  "$PYTHON" -m venv .venv || { rm -rf .venv; exit 1; }
fi
wanted="$(cat requirements.txt; echo "$@")"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing requirements.txt $* into .venv: at first a download of several GB, before the command itself starts"
  if .venv/bin/python -m pip install --quiet uv; then
    .venv/bin/uv pip install --compile-bytecode --python .venv/bin/python -r requirements.txt "$@" ||
      .venv/bin/python -m pip install -r requirements.txt "$@"
  else
    .venv/bin/python -m pip install -r requirements.txt "$@"
  fi
  echo "$wanted" > .venv/installed
  echo "installed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
fi
export PATH="$root/.venv/bin:$PATH"
