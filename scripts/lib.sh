# SPDX-License-Identifier: Apache-2.0 OR MIT
# shellcheck shell=bash
# What the scripts share: talking, waiting, and installing what is missing.

# -h, --help: the comment that a script begins with.
case "${1:-}" in
-h | --help)
	sed -n '1,2d; /^#/!q; s/^# \{0,1\}//p' "$0"
	exit 0
	;;
esac

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TOP

RUST_WANTED=1.88

say() { printf '==> %s\n' "$*" >&2; }
die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

need_root() {
	[ "$(id -u)" = 0 ] || die "needs root (network namespaces, BPF): run it with sudo"
}

# wait_for SECONDS WHAT COMMAND…: polls until the command succeeds.
wait_for() {
	local deadline=$((SECONDS + $1)) what=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ "$SECONDS" -lt "$deadline" ] || die "gave up waiting for $what"
		sleep 0.05
	done
}

# install_missing PACKAGE…: with apt, those that are not there.
install_missing() {
	local missing=() package
	for package in "$@"; do
		dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
			missing+=("$package")
	done
	[ ${#missing[@]} -eq 0 ] && return
	command -v apt-get >/dev/null || die "not Debian or Ubuntu; please install: ${missing[*]}"
	say "installing with apt: ${missing[*]}"
	apt-get -o DPkg::Lock::Timeout=300 update -qq
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \
		"${missing[@]}" >/dev/null
	# These packages start services of their own, which nothing here uses.
	local service
	for service in mosquitto redis-server keepalived frr prometheus prometheus-node-exporter; do
		if [[ " ${missing[*]} " == *" $service "* ]] && command -v systemctl >/dev/null; then
			systemctl disable --now "$service" >/dev/null 2>&1 || true
		fi
	done
}

# Packages for building, and for the lab.
install_packages() {
	install_missing clang llvm make gcc pkg-config libelf-dev zlib1g-dev linux-libc-dev libc6-dev \
		redis-server openssl \
		iproute2 ethtool mosquitto mosquitto-clients python3 python3-paho-mqtt tcpdump procps \
		util-linux ca-certificates curl
}

rust_is_recent() {
	local version
	command -v cargo >/dev/null || return 1
	version=$(rustc --version 2>/dev/null | cut -d' ' -f2)
	[ "$(printf '%s\n%s\n' "$RUST_WANTED" "$version" | sort -V | head -n1)" = "$RUST_WANTED" ]
}

install_rust() {
	[ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
	rust_is_recent && return
	if apt-cache show rustup >/dev/null 2>&1; then
		say "installing Rust with apt's rustup (cargo $RUST_WANTED or later is needed)"
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rustup >/dev/null
		rustup -q default stable
	else
		say "installing Rust with rustup from https://sh.rustup.rs (cargo $RUST_WANTED or later is needed)"
		curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
			sh -s -- -y -q --profile minimal
		. "$HOME/.cargo/env"
	fi
	rust_is_recent || die "cargo is still older than $RUST_WANTED: $(cargo --version 2>&1)"
}

install_all() {
	install_packages
	install_rust
}

# In the profile that tests are built in, so that nothing is built twice. XDP programs are compiled with
# -O2 in any profile; scripts/package and measurements use the release profile.
build() {
	say "building (cargo build; on two cores some three minutes the first time, nearly all for dependencies)"
	(cd "$TOP" && cargo build --locked "$@")
}
