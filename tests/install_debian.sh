#!/bin/sh
# Installs Debian's ffmpeg, which tests/test_video_formats.py compares with. Never fails: without it, those tests are skipped.
command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null && exit 0
skipped() {
    echo "tests/install_debian.sh: $1; tests that compare with ffmpeg will be skipped" >&2
    exit 0
}
command -v apt-get >/dev/null || skipped "no ffmpeg, and no apt-get to install it with"
[ "$(id -u)" = 0 ] || skipped "no ffmpeg, and only root can install it (apt-get install ffmpeg)"
export DEBIAN_FRONTEND=noninteractive
quick="-qq -o Acquire::http::Timeout=20 -o Acquire::Retries=0"
apt-get $quick update >/dev/null && apt-get $quick install --no-install-recommends ffmpeg >/dev/null ||
    skipped "apt-get could not install ffmpeg"
