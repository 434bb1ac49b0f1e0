#!/usr/bin/env bash
# Install the Debian packages that `make install`, the two-hosts test, the tests of pages in a browser and those of a real
# object store (Ceph's radosgw) and of state on NVMe need, if any is missing. Needs root and apt-get; says what it does.
# Exit 0 when everything is there, 1 when something is still missing.
set -euo pipefail

# program=package
wanted=(make=make g++=g++ ip=iproute2 sshd=openssh-server ssh=openssh-client ssh-keygen=openssh-client pdsh=pdsh
  chromium=chromium radosgw=radosgw ceph-osd=ceph-osd ceph-mon=ceph-mon ceph=ceph-common)
PATH="$PATH:/usr/sbin:/sbin"

missing=()
for pair in "${wanted[@]}"; do
  command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
done
# a browser without a font draws no text
[ -e /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf ] || missing+=(fonts-dejavu-core)
# DeepSpeed compiles its asynchronous I/O against it
[ -e /usr/include/libaio.h ] || missing+=(libaio-dev)
if ((${#missing[@]} == 0)); then
  echo "system packages: all there"
  exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "system packages: missing ${missing[*]}; installing them needs root and apt-get" >&2
  exit 1
fi
echo "system packages: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# policy-rc.d in the environment of dpkg: installing sshd must not start a server on this machine
policy=/usr/sbin/policy-rc.d
made_policy=0
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  made_policy=1
fi
trap '((made_policy)) && rm -f "$policy"; true' EXIT
apt-get install -y -qq --no-install-recommends "${missing[@]}"
