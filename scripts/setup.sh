# Sourced by the other scripts: makes .venv at the root of the repository from constraints.txt,
# or brings it up to date when constraints.txt or pyproject.toml has changed.
# shellcheck shell=bash

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
python="$venv/bin/python"

fail() {
    printf 'Error: %s\n' "$*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                fail "$candidate cannot make virtual environments; install its venv package" \
                    "(Debian and Ubuntu: apt install $candidate-venv) and run this again."
            fi
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later found (looked for python3.11, python3.12, python3.13," \
        "python3). Install one, make sure that it is on the PATH, and run this again."
}

# quietly TITLE COMMAND...: print one line; what the command says only if it fails.
quietly() {
    local title="$1" log
    shift
    printf '%s ...\n' "$title" >&2
    log="$(mktemp)"
    if ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        fail "this failed: $*. The lines above are the end of $log."
    fi
    rm -f "$log"
}

# set_up EXTRA: test (what scripts/demo and scripts/test need) or dev (also linters).
set_up() {
    local extra="$1" stamp chosen
    stamp="$(cat "$root/constraints.txt" "$root/pyproject.toml" <(printf '%s' "$root") | cksum)"
    if [[ "$(cat "$venv/stamp-$extra" 2>/dev/null)" == "$stamp" ]]; then
        return
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        chosen="$(find_python)"
        quietly "Making .venv with $chosen" "$chosen" -m venv --clear "$venv"
    fi
    local install=("$python" -m pip install --disable-pip-version-check -c "$root/constraints.txt")
    quietly "Installing torch (once; it is large)" "${install[@]}" "torch==2.13.0" setuptools
    quietly "Installing medseg[$extra]" "${install[@]}" --no-build-isolation -e "$root[$extra]"
    printf '%s' "$stamp" >"$venv/stamp-$extra"
    if [[ "$extra" == dev ]]; then
        printf '%s' "$stamp" >"$venv/stamp-test"
    fi
}
