#!/usr/bin/env bash
# Prepares one node of a cluster that `ray up` starts. The folder above this one (~/patchloom) has what `make dist` made:
#
#   bash ~/patchloom/node/setup.sh [NAME=VALUE ...]
#
# It makes a virtual environment there, installs the wheel in dist/ with the versions of dist/constraints.txt, and
# writes env.sh, which every shell of Ray reads. NAME=VALUE are more variables for env.sh. A second call updates the
# node.
#
# PYTHON names another interpreter (3.11 or newer). PATCHLOOM_EXTRAS are pip extras of the wheel (default: s3).
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
extras=${PATCHLOOM_EXTRAS-s3}

"$python" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else
    f"{sys.executable} is Python {sys.version.split()[0]}, and Patchloom needs 3.11 or newer: set PYTHON")'
wheels=("$folder"/dist/patchloom-*.whl)
if [ ${#wheels[@]} -ne 1 ] || [ ! -f "${wheels[0]}" ]; then
    echo "$folder/dist does not have exactly one wheel of Patchloom: run 'make dist' and 'ray up' again" >&2
    exit 2
fi

if ! "$python" -c 'import ensurepip' 2>/dev/null; then # Ubuntu's Python comes without venv
    sudo apt-get -o DPkg::Lock::Timeout=600 update -q
    sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 install -q -y python3-venv
fi
[ -x "$folder/venv/bin/python" ] || "$python" -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$folder/dist/constraints.txt")
"${pip[@]}" "${wheels[0]}${extras:+[$extras]}"
"${pip[@]}" --no-deps --force-reinstall "${wheels[0]}" # pip keeps a changed wheel of the same version otherwise

# `ray job stop` kills a job 3 s after SIGTERM by default; writing and uploading a checkpoint takes longer.
{
    printf "export PATH=%q:\"\$PATH\"\n" "$folder/venv/bin"
    for pair in RAY_AUTH_MODE=token RAY_JOB_STOP_WAIT_TIME_S=300 "$@"; do
        printf 'export %s=%q\n' "${pair%%=*}" "${pair#*=}"
    done
} >"$folder/env.sh"
grep -qsF "$folder/env.sh" ~/.bashrc || echo ". $folder/env.sh" >>~/.bashrc
[ ! -f ~/.ray/auth_token ] || chmod 600 ~/.ray/auth_token
