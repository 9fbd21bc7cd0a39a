#!/usr/bin/env bash
# Fetches the parts of onnxruntime-web that run an exported task in a browser, into service/web/offline/, which the
# service then serves under /offline/. Nothing is fetched when they are there already. Needs npm, and nothing else of it.
set -euo pipefail
cd "$(dirname "$0")/.."
PACKAGE=onnxruntime-web
VERSION=1.30.0
OUT=service/web/offline
SUMS="\
219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b  ort.wasm.min.mjs
e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b  ort-wasm-simd-threaded.mjs
3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2  ort-wasm-simd-threaded.wasm"

right() { # folder: whether it holds exactly these files
  (cd "$1" 2>/dev/null && if command -v sha256sum >/dev/null; then sha256sum --check; else shasum -a 256 --check; fi \
    <<<"$SUMS" >/dev/null 2>&1)
}

if right "$OUT"; then
  echo "$OUT: $PACKAGE $VERSION is there already."
  exit
fi
command -v npm >/dev/null || { echo "npm is missing: it fetches $PACKAGE." >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm pack --silent --ignore-scripts --pack-destination "$work" "$PACKAGE@$VERSION" >/dev/null
mkdir "$work/files"
for name in $(awk '{print $2}' <<<"$SUMS"); do
  tar -xzOf "$work/$PACKAGE-$VERSION.tgz" "package/dist/$name" >"$work/files/$name"
done
right "$work/files" || { echo "What was fetched is not $PACKAGE $VERSION: a sha256 differs. Nothing was kept." >&2; exit 1; }
chmod 644 "$work/files"/* # whoever serves them may be another user
rm -rf "$OUT"
mkdir -p "$OUT"
cp "$work/files"/* "$OUT"
echo "$OUT: $PACKAGE $VERSION"
