/* SPDX-License-Identifier: GPL-2.0-only */
/* TLS' numbers, as far as a ClientHello needs them. */
#ifndef MQTT_FWD_LIB_TLS_H
#define MQTT_FWD_LIB_TLS_H

enum tls {
	TLS_HANDSHAKE = 22, /* content type of a record (RFC 8446 §5.1) */
	TLS_MAJOR = 3, /* upper byte of a record's version, of SSL 3.0 and all since */
	TLS_RECORD_HEADER = 5, /* bytes */
	TLS_RECORD_MAX = 1 << 14, /* bytes of plaintext */
	TLS_CLIENT_HELLO = 1, /* handshake type (RFC 8446 §4) */
	TLS_HELLO_FIXED = 2 + 32, /* bytes: version and random */
	TLS_SERVER_NAME = 0, /* extension (RFC 6066 §3) */
	TLS_HOST_NAME = 0, /* type of a server name, the only one there is */
	TLS_ALPN = 16, /* extension (RFC 7301 §3.1) */
};

#endif /* MQTT_FWD_LIB_TLS_H */
