#!/usr/bin/env bash
# Build images without Docker and without an image registry: buildah on a Debian base made here by debootstrap, with
# wheels that pip collects on this machine. Then look inside, start the API and ask it for /livez.
#
#   deploy/images.sh [api] [worker] [sender]      the api alone by default
#
# Needs root, buildah and debootstrap. Everything lies in build/ (ignored by git): the base and the wheels are kept for
# the next run, the images and their layers are removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

targets=("${@:-api}")
declare -A modules=([api]=app.main [worker]=worker.main [sender]=app.sender)
python=${PYTHON:-.venv/bin/python}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
base=build/images/bookworm.tar
wheels=build/wheels

fail() { echo "images: $*" >&2; exit 1; }

for target in "${targets[@]}"; do
  [ -n "${modules[$target]:-}" ] || fail "$target is none of: ${!modules[*]}"
done

for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || fail "$tool is missing; apt-get install --no-install-recommends buildah debootstrap"
done
[ "$(id -u)" = 0 ] || fail "debootstrap and chroot need root; run with sudo"

mkdir -p build/images "$wheels"
scratch=$(mktemp -d "$PWD/build/images/run.XXXXXX")
server=""

# A process and those that it started, the youngest generation last: buildah passes no signal on to what it runs.
descendants() {
  local child
  echo "$1"
  for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do descendants "$child"; done
}

cleanup() {
  [ -z "$server" ] || kill -KILL $(descendants "$server") 2>/dev/null || true
  buildah_ rm --all >/dev/null 2>&1 || true
  # Never remove what is still mounted from elsewhere.
  findmnt --raw --noheadings --output TARGET | grep -F "$scratch" | sort -r | xargs -r -n1 umount || true
  rm -rf --one-file-system "$scratch"
}
trap cleanup EXIT

buildah_() { buildah --root "$scratch/storage" --runroot "$scratch/runroot" --storage-driver vfs "$@"; }

# The base: a minimal Debian 12, without even Python, as the Dockerfile must manage with.
if [ ! -s "$base" ]; then
  echo "images: debootstrap of Debian 12 into $base"
  debootstrap --variant=minbase bookworm "$scratch/rootfs" "$mirror" >"$scratch/debootstrap.log" 2>&1 \
    || { tail -20 "$scratch/debootstrap.log" >&2; fail "debootstrap failed"; }
  rm -rf "$scratch"/rootfs/var/cache/apt/archives/*.deb "$scratch"/rootfs/var/lib/apt/lists/*
  # The security archive, as Debian's own images have it.
  printf '%s\n' "deb $mirror bookworm main" "deb $mirror bookworm-updates main" \
    "deb ${mirror%/debian}/debian-security bookworm-security main" >"$scratch/rootfs/etc/apt/sources.list"
  tar --numeric-owner -C "$scratch/rootfs" -cf "$base.part" . && mv "$base.part" "$base"
  rm -rf "$scratch/rootfs"
fi
container=$(buildah_ from scratch)
buildah_ add --quiet "$container" "$base" / >/dev/null
buildah_ commit --quiet --format docker --rm "$container" safelight-base >/dev/null

# The wheels, for the base's Python and not for this machine's. pip here may know indexes that the build cannot see.
requirements() {
  "$python" - "$@" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
extras = project["project"]["optional-dependencies"]
lists = [project["build-system"]["requires"], project["project"]["dependencies"]]
lists += [extras[target] for target in sys.argv[1:] if target in extras]
print(*[line for lines in lists for line in lines], sep="\n")
PY
}
requirements "${targets[@]}" >"$scratch/requirements.txt"
# pip judges markers by the Python it runs on: redis asks for this below 3.11.3, and Debian 12 has 3.11.2.
echo async-timeout >>"$scratch/requirements.txt"
"$python" -m pip download --quiet --dest "$wheels" --constraint constraints.txt --find-links "$wheels" \
  --python-version 3.11 --only-binary :all: --requirement "$scratch/requirements.txt" >"$scratch/pip.log" 2>&1 \
  || { tail -20 "$scratch/pip.log" >&2; fail "pip download failed"; }

look_inside() { # target image
  local container root found
  container=$(buildah_ from "$2")
  root=$(buildah_ mount "$container")
  local unwanted="pip wheel hatchling"
  # torch asks for setuptools at run time.
  [ "$1" = worker ] || unwanted="$unwanted setuptools torch diffusers transformers worker"
  [ "$1" = api ] || unwanted="$unwanted fastapi uvicorn"
  for name in $unwanted; do
    found=$(find "$root/opt/safelight" -maxdepth 5 -path "*/site-packages/$name" -print -quit)
    [ -z "$found" ] || fail "$1 holds $name: ${found#"$root"}"
  done
  found=$(find "$root/usr/bin" \( -name 'gcc*' -o -name 'make' -o -name 'pip*' \) -print -quit)
  [ -z "$found" ] || fail "$1 holds a build tool: ${found#"$root"}"
  echo "images: $1 $(du -sm "$root" | cut -f1) MB unpacked, of it /opt/safelight $(du -sm "$root/opt/safelight" | cut -f1) MB;" \
    "holds none of: $unwanted"
  buildah_ umount "$container" >/dev/null
  # What was taken out must not be missed.
  buildah_ run --isolation chroot "$container" -- /opt/safelight/bin/python -c "import app.cli, ${modules[$1]}" \
    || fail "$1 misses a module that it needs"
  buildah_ rm "$container" >/dev/null
}

ask_livez() { # image
  local container port started
  container=$(buildah_ from "$1")
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  started=$SECONDS
  # /livez asks for nothing but the process itself: the Redis named here does not exist. The image listens on all
  # addresses; here, on the host's network, loopback is enough.
  buildah_ run --isolation chroot --env SAFELIGHT_HOST=127.0.0.1 --env "SAFELIGHT_PORT=$port" \
    --env SAFELIGHT_REDIS_URL=redis://127.0.0.1:1/0 --env SAFELIGHT_API_KEY=only-for-this-check \
    "$container" -- /opt/safelight/bin/safelight api >"$scratch/api.log" 2>&1 &
  server=$!
  until "$python" -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$port/livez', timeout=2).status)" \
    2>/dev/null | grep -q 200; do
    kill -0 "$server" 2>/dev/null || { cat "$scratch/api.log" >&2; fail "the api ended before it answered /livez"; }
    [ $((SECONDS - started)) -lt 60 ] || { cat "$scratch/api.log" >&2; fail "/livez did not answer within 60 s"; }
    sleep 0.2
  done
  echo "images: api answers /livez with 200 after $((SECONDS - started)) s"
  kill -TERM "$(descendants "$server" | tail -n 1)"
  wait "$server" || { cat "$scratch/api.log" >&2; fail "the api did not end with 0 on SIGTERM"; }
  server=""
  echo "images: api ends with 0 on SIGTERM"
  buildah_ rm "$container" >/dev/null
}

for target in "${targets[@]}"; do
  started=$SECONDS
  buildah_ bud --format docker --isolation chroot --quiet --target "$target" --tag "safelight-$target" \
    --build-arg BASE=localhost/safelight-base --build-arg "WHEELS=$wheels" --build-arg OFFLINE=1 . >"$scratch/bud.log" 2>&1 \
    || { tail -40 "$scratch/bud.log" >&2; fail "the build of $target failed"; }
  echo "images: $target built in $((SECONDS - started)) s"
  look_inside "$target" "safelight-$target"
  [ "$target" != api ] || ask_livez "safelight-$target"
done
