#!/usr/bin/env bash
# How much room a client takes, without torch: a fresh virtual environment with what an edge box needs and no more.
#
#   benchmarks/client_size.sh [PYTHON]        # prints MB a package and in all; bash, du and network access to an index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
"${1:-python3}" -m venv "$place/venv"
python="$place/venv/bin/python"
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
before="$(du -sk "$site" | cut -f1)"

# torch is left out of the dependencies, and those that others need are found as usual.
"$python" - > "$place/needed.txt" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    needed = tomllib.load(file)["project"]["dependencies"]
print("\n".join(line for line in needed if not line.startswith("torch")))
PYTHON
pip=("$python" -m pip --disable-pip-version-check install --quiet --no-compile)
"${pip[@]}" -c constraints.txt -r "$place/needed.txt"
# From a copy: a build leaves its folders behind.
mkdir "$place/source"
cp -r pyproject.toml README.md LICENSE fedknow protocols client strategies server simulations "$place/source"
"${pip[@]}" --no-deps "$place/source"

du -sk "$site"/* | sort -rn | awk '$1 >= 1024 { printf "%6.1f MB  %s\n", $1 / 1024, $2 }' | sed "s|$site/||"
after="$(du -sk "$site" | cut -f1)"
awk -v size="$((after - before))" 'BEGIN { printf "%6.1f MB  in all, beside pip (which is not counted) and torch\n", size / 1024 }'
