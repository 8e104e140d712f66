#!/usr/bin/env bash
# Installs what the tests need and runs them: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/setup.sh

install_environment gguf,scene-text,dev
export PATH="$venv/bin:$PATH"
ruff format --check .
ruff check .
mypy
exec python -m pytest "$@"
