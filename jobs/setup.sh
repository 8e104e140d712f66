# Makes the environment that quickstart.sh and tests/run.sh use; to be sourced from the repo's root.
# Surprising: llama-cpp-python is compiled from source, beside the download of all else; pip keeps
# the built wheel in its cache. What each part took stands in $venv/install.json.

venv=${LLAVA_RAY_VENV:-$PWD/.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1

die() { echo "error: $*" >&2; exit 2; }

find_python() {  # $PYTHON alone where it is set
    local candidate candidates=(python3.12 python3.11 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

safe_compiler_flags() {  # Flags without which this compiler's llama.cpp would crash.
    # gcc before 13 writes AMX's tile configuration wrongly (llama.cpp issue 20824).
    local flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" compiler=${CXX:-c++}
    case $(uname -m) in x86_64 | i686) ;; *) return 0 ;; esac
    case $($compiler --version 2>/dev/null) in *clang*) return 0 ;; esac
    [ "$($compiler -dumpversion | cut -d. -f1)" -lt 13 ] || return 0
    # A gcc that does not know AMX cannot compile it either.
    $compiler $flags -x c++ -c -o /dev/null /dev/null 2>/dev/null || return 0
    echo "$flags"
}

build_llama_cpp() {  # $1: requirements, $2: folder for the wheel
    local flags c_flags start=$SECONDS
    flags=$(safe_compiler_flags)
    c_flags=$flags  # The C compiler may be another one.
    ${CC:-cc} $flags -x c -c -o /dev/null /dev/null 2>/dev/null || c_flags=
    grep -A 1 '^llama-cpp-python==' "$1" > "$2/requirement.txt"
    # Settings are split at spaces, which the path of the repository may have.
    cp jobs/llama_cpp.cmake "$2/"
    CFLAGS="${CFLAGS:-} $c_flags" CXXFLAGS="${CXXFLAGS:-} $flags" \
    CMAKE_ARGS="${CMAKE_ARGS:-} -DCMAKE_PROJECT_INCLUDE=$2/llama_cpp.cmake" \
        "$venv/bin/pip" wheel -q --no-deps --require-hashes -w "$2" -r "$2/requirement.txt" || return
    echo $((SECONDS - start)) > "$2/seconds"
}

install_requirements() {  # $1: requirements; uv takes seconds, pip knows every kind of index
    local index
    index=${PIP_INDEX_URL:-$("$venv/bin/pip" config get global.index-url 2>/dev/null || true)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
    [ -z "${PIP_EXTRA_INDEX_URL:-}" ] || export UV_INDEX=${UV_INDEX:-$PIP_EXTRA_INDEX_URL}
    export UV_SYSTEM_CERTS=1
    if "$venv/bin/pip" install -q --require-hashes -r jobs/requirements/uv.txt \
        && "$venv/bin/uv" pip install -q --python "$venv/bin/python" --require-hashes -r "$1"; then
        return
    fi
    echo "uv did not succeed; pip installs the same packages" >&2
    "$venv/bin/pip" install -q --no-deps --no-compile --require-hashes -r "$1"
}

provide_bytecode() {  # $1: requirements; compiled once for each, beside what comes next, then kept
    local site kept seldom="/(tests?|testing|rllib)/|/transformers/models/(?!auto|clip|llama|llava)"
    site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    kept=${LLAVA_RAY_CACHE:-$HOME/.cache/llava_ray}/bytecode
    kept=$kept/$({ cat "$1"; "$venv/bin/python" --version; } | cksum | tr ' ' -).tar
    if [ -f "$kept" ]; then
        tar -xf "$kept" -C "$site"
        return
    fi
    mkdir -p "${kept%/*}"
    {
        # First what is imported first.
        nice -n 19 "$venv/bin/python" -m compileall -q -j 2 -x "$seldom" \
            "$site/ray" "$site/torch" "$site/transformers" "$site" || true
        find "${kept%/*}" -name "*.tar*" -mtime +30 -delete
        (cd "$site" && find . -name "*.pyc" -print0 | tar --null -T - -cf "$kept.$$")
        mv "$kept.$$" "$kept"
    } > "$venv/bytecode.log" 2>&1 &
}

install_environment() {  # $1: the name of a file in jobs/requirements, without .txt
    local requirements=jobs/requirements/$1.txt wanted python free_kb work build start downloads compile
    case $venv in *[[:space:]]*) die "Ray starts no worker from a path with spaces, $venv: clone elsewhere or set LLAVA_RAY_VENV" ;; esac
    [ -f "$requirements" ] || die "no $requirements: this runs on Linux on x86_64 and aarch64"
    wanted=$(cat pyproject.toml jobs/llama_cpp.cmake "$requirements" | cksum)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    python=$(find_python) || die "no Python 3.11 or 3.12 with venv (looked at ${PYTHON:-python3.12, python3.11, python3}): install one or set PYTHON=/path/to/python"
    command -v ${CXX:-c++} >/dev/null || die "no C++ compiler ${CXX:-c++} found: install g++ (llama-cpp-python is compiled)"
    free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -gt 12000000 ] || die "$((free_kb / 1024)) MB free in $PWD: the environment needs 12000 MB while it is made"
    echo "installing into $venv (about 4 minutes; llama-cpp-python is compiled meanwhile)"
    "$python" -m venv "$venv" || die "$python cannot make a virtual environment at $venv"
    work=$(mktemp -d)
    set -m  # A group of its own, so that the compilers end with it.
    build_llama_cpp "$requirements" "$work" > "$work/log" 2>&1 &
    set +m
    build=$!
    trap "kill -- -$build 2>/dev/null || true; rm -rf '$work'" EXIT
    start=$SECONDS
    sed '/^llama-cpp-python==/,+1d' "$requirements" > "$work/requirements.txt"
    install_requirements "$work/requirements.txt" \
        || die "the packages could not be had; the reason stands above"
    downloads=$((SECONDS - start))
    wait $build || { tail -n 30 "$work/log" >&2; die "llama-cpp-python could not be compiled; the reason stands above"; }
    compile=$(cat "$work/seconds")
    start=$SECONDS
    "$venv/bin/uv" pip install -q --python "$venv/bin/python" --offline --no-deps --no-build-isolation "$work"/*.whl -e . 2>/dev/null \
        || "$venv/bin/pip" install -q --no-index --no-deps --no-build-isolation "$work"/*.whl -e . \
        || die "the installation failed; its reason stands above"
    rm -r "$work"
    trap - EXIT
    echo "{\"downloads_s\": $downloads, \"compile_s\": $compile, \"install_s\": $((SECONDS - start))}" > "$venv/install.json"
    provide_bytecode "$requirements"
    echo "$wanted" > "$venv/.installed"
}
