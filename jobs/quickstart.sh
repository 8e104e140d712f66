#!/usr/bin/env bash
# Captions in, a served quantized LLaVA out, on this machine:
#   bash jobs/quickstart.sh
#   bash jobs/quickstart.sh data.source=tests/data/real/captions.jsonl
# Arguments are overrides of jobs/configs/quickstart.yaml, or --config FILE. Run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."
source jobs/setup.sh

install_environment "linux-$(uname -m)"
exec "$venv/bin/llava-ray" quickstart "$@"
