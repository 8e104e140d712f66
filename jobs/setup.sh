# Makes the environment that quickstart.sh and tests/run.sh use; to be sourced from the repo's root.
# Surprising: llama-cpp-python is compiled from source, which takes 5 to 15 minutes the first time;
# pip keeps the built wheel in its cache.

venv=${LLAVA_RAY_VENV:-$PWD/.venv}

die() { echo "error: $*" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

install_environment() {  # $1: extras, comma-separated
    local extras=$1 wanted python free_kb
    wanted="$extras $(cksum < pyproject.toml)"
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python) || die "no Python 3.11 or 3.12 with venv found: install one or set PYTHON=/path/to/python"
    command -v c++ >/dev/null || die "no C++ compiler found: install g++ (llama-cpp-python is compiled)"
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -gt 9000000 ] || die "$((free_kb / 1024)) MB free in $PWD: the environment needs 9000 MB"
    echo "installing into $venv (about 5 minutes, 5 to 15 more where llama-cpp-python must be compiled)"
    "$python" -m venv "$venv" || die "$python cannot make a virtual environment at $venv"
    "$venv/bin/pip" install -q --upgrade pip
    "$venv/bin/pip" install -q -e ".[$extras]" || die "the installation failed; its reason stands above"
    echo "$wanted" > "$venv/.installed"
}
