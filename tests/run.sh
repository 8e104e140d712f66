#!/usr/bin/env bash
# Installs what the tests need and runs them: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/setup.sh

install_environment "dev-linux-$(uname -m)"
export PATH="$venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
# Tests run in a process beside pytest's own: one that native code ends fails its test alone, and
# the closing line is printed in any case.
exec python -m pytest -n 1 --max-worker-restart 20 "$@"
