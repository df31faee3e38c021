#!/bin/sh
# Makes sure that Debian packages are there: installs them as root, otherwise names them.
# Usage: packages.sh PACKAGE...
set -eu
missing=""
for package in "$@"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing:$missing"
  export DEBIAN_FRONTEND=noninteractive
  # A service that a package brings must not start by itself on somebody's machine.
  policy=/usr/sbin/policy-rc.d
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; trap 'rm -f $policy' EXIT; }
  apt-get update -qq
  # shellcheck disable=SC2086
  apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
  echo "These packages are missing:$missing"
  echo "hint: as root, apt-get install$missing"
  [ "${CI:-}" != true ] || exit 1
fi
