#!/usr/bin/env bash
# Writes deploy/requirements-cpu.txt and deploy/requirements-gpu.txt: every package of the two images, in one version,
# with the sha256 of each of its files. Versions stay as they are while they satisfy pyproject.toml.
#   make lock                                     both; a minute for cpu, some minutes for gpu (it fetches torch's wheel)
#   bash deploy/lock.sh cpu --upgrade             one; what else is given is for pip-compile (pip-tools)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wanted="cpu gpu"
case "${1-}" in cpu | gpu) wanted=$1 && shift ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
  || { echo "The images run Python 3.11, so this needs it as well: markers are settled here." >&2; exit 1; }
"$python" -c "import piptools" 2>/dev/null || { echo "pip-tools is missing: it is in the extra \`dev\`." >&2; exit 1; }
# Two machines write the same file: no wheels that only one of them has. PIP_INDEX_URL may name a mirror.
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for image in $wanted; do
  # As the images are: torch in place of onnxruntime on a GPU, where no task is exported either.
  "$python" - "$image" >"$work/$image.in" <<'PYTHON'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
lines = project["dependencies"] + extras["serve"]
if sys.argv[1] == "gpu":
    lines = [line for line in lines if not line.startswith("onnx")] + extras["gpu"]
lines.append("async-timeout>=4.0.3,<6")  # of redis below Python 3.11.3: which patch version an image has is not locked
print("\n".join(lines))
PYTHON
  out=deploy/requirements-$image.txt
  [ -e "$out" ] && cp "$out" "$work/$image.txt"
  "$python" -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
    --constraint deploy/constraints.txt "$@" --output-file "$work/$image.txt" "$work/$image.in"
  { echo "# What the image \`$image\` installs, for Linux and Python 3.11. Written by \`make lock\`, not by hand."; cat "$work/$image.txt"; } \
    | awk 'NR == 1 || !/^(#|$)/' >"$out"
  echo "$out: $(grep -c '==' "$out") packages"
done
