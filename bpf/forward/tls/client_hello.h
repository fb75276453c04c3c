/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * ClientHello (RFC 8446 §4.1.2, RFC 5246 §7.4.1.2): the server name that it asks for, and the protocols that it offers,
 * with the groups of their routes. Of an encrypted one (ECH) that is the outer name.
 *
 * It is read as far as it takes: to the server name, if that has a route. Extensions come in any order, and of any kind.
 * The message may lie in several TLS records, cut anywhere: what reads a number, skips or copies goes on in the next one.
 * All of it is bounded: records, extensions, protocols, and the bytes of a name that are looked at.
 */
#ifndef MQTT_FWD_TLS_CLIENT_HELLO_H
#define MQTT_FWD_TLS_CLIENT_HELLO_H

#include "../../lib/mqtt.h"
#include "../../lib/tls.h"
#include "../../maps/config.h"
#include "../../maps/scratch.h"
#include "../handshake/late_name.h"

#define HELLO_RECORDS 16
#define HELLO_EXTENSIONS 48
#define HELLO_PROTOCOLS 8

/* Of which nothing more can be read: it is malformed, or too finely divided. */
static __always_inline long hello_refuse(struct hello *h)
{
	h->outcome = HELLO_NONE;
	return -1;
}

static __always_inline long hello_cut(struct hello *h)
{
	h->outcome = HELLO_MORE;
	return -1;
}

/* The next record's header. */
static __always_inline long record_begin(struct xdp_md *ctx, struct hello *h)
{
	const __u8 *p = frame_at(ctx, h->offset, TLS_RECORD_HEADER);

	if (!p || h->offset + TLS_RECORD_HEADER > h->end) {
		/* Its first bytes may show already that it is none. */
		p = frame_at(ctx, h->offset, 1);
		return p && h->offset < h->end && *p != TLS_HANDSHAKE ? hello_refuse(h)
								      : hello_cut(h);
	}
	if (p[0] != TLS_HANDSHAKE || p[1] != TLS_MAJOR || h->records++ >= HELLO_RECORDS)
		return hello_refuse(h);
	h->record = p[3] << 8 | p[4];
	h->offset += TLS_RECORD_HEADER;
	if (!h->record || h->record > TLS_RECORD_MAX)
		return hello_refuse(h);
	return 0;
}

/* The next number, of 1 to 4 bytes; -1: there is none (see hello.outcome). Global (see event.h). */
__noinline long hello_number(struct xdp_md *ctx, __u32 bytes)
{
	struct scratch *w = scratch();
	struct hello *h;
	const __u8 *p;
	long value = 0;

	if (!w || bytes > 4)
		return -1;
	h = &w->hello;
	if (h->message < bytes)
		return hello_refuse(h);
	p = frame_at(ctx, h->offset, 4);
	if (p && h->record >= bytes && h->offset + bytes <= h->end) {
		h->offset += bytes;
		h->record -= bytes;
		h->message -= bytes;
		return bpf_ntohl(*(__be32 *)p) >> (8 * (4 - bytes) & 31);
	}
	for (__u32 i = 0; i < 4; i++) {
		if (i >= bytes)
			break;
		if (!h->record && record_begin(ctx, h))
			return -1;
		p = frame_at(ctx, h->offset, 1);
		if (!p || h->offset >= h->end)
			return hello_cut(h);
		value = value << 8 | *p;
		h->offset++;
		h->record--;
		h->message--;
	}
	return value;
}

struct hello_scan {
	struct xdp_md *ctx;
	struct scratch *w;
	const struct service_table *t;
	const struct service *svc;
	__u32 left;
};

static long skip_step(__u32 i, void *arg)
{
	struct hello_scan *s = arg;
	struct hello *h = &s->w->hello;
	__u32 taken;

	(void)i;
	if (!s->left || (!h->record && record_begin(s->ctx, h)))
		return 1;
	taken = s->left < h->record ? s->left : h->record;
	h->offset += taken;
	h->record -= taken;
	h->message -= taken;
	s->left -= taken;
	return 0;
}

/* Skips bytes, which need not lie in the segment; -1: that cannot be. Global (see event.h). */
__noinline int hello_skip(struct xdp_md *ctx, __u32 bytes)
{
	struct scratch *w = scratch();
	struct hello_scan s = {.ctx = ctx, .w = w, .left = bytes};

	if (!w)
		return -1;
	if (w->hello.message < bytes)
		return hello_refuse(&w->hello);
	bpf_loop(HELLO_RECORDS + 2, skip_step, &s, 0);
	if (!s.left)
		return 0;
	return w->hello.outcome == HELLO_READ ? hello_refuse(&w->hello) : -1;
}

/* What of it lies in one record. */
static long text_step(__u32 i, void *arg)
{
	struct hello_scan *s = arg;
	struct hello *h = &s->w->hello;
	__u32 taken, at = h->text_length - s->left;

	(void)i;
	if (!s->left || (!h->record && record_begin(s->ctx, h)))
		return 1;
	taken = s->left < h->record ? s->left : h->record;
	if (h->offset + taken > h->end)
		return hello_cut(h) != 0;
	barrier_var(at);
	if (!frame_copy(s->ctx, h->offset, h->text + (at & (CLIENT_ROUTE_TEXT_MAX - 1)), taken,
			CLIENT_ROUTE_TEXT_MAX))
		return hello_refuse(h) != 0;
	h->offset += taken;
	h->record -= taken;
	h->message -= taken;
	s->left -= taken;
	return 0;
}

/* The next bytes, CLIENT_ROUTE_TEXT_MAX at most, to hello.text; -1: they are not there. Global (see event.h). */
__noinline int hello_text(struct xdp_md *ctx, __u32 bytes)
{
	struct scratch *w = scratch();
	struct hello_scan s = {.ctx = ctx, .w = w, .left = bytes};
	struct hello *h;

	if (!w || !bytes || bytes > CLIENT_ROUTE_TEXT_MAX)
		return -1;
	h = &w->hello;
	if (h->message < bytes)
		return hello_refuse(h);
	h->text_length = bytes;
	__builtin_memset(h->text, 0, sizeof(h->text));
	bpf_loop(HELLO_RECORDS + 2, text_step, &s, 0);
	if (!s.left)
		return 0;
	return h->outcome == HELLO_READ ? hello_refuse(h) : -1;
}

/* A byte of hello.text to the key of its route. Of names, the last one is the first. */
static long route_key_step(__u32 i, void *arg)
{
	struct scratch *w = ((struct hello_scan *)arg)->w;
	bool is_name = w->client_route.kind == CLIENT_ROUTE_SNI;
	__u32 from = is_name ? w->hello.text_length - 1 - i : i;
	__u8 byte = w->hello.text[from & (CLIENT_ROUTE_TEXT_MAX - 1)];

	if (is_name && byte >= 'A' && byte <= 'Z')
		byte |= 0x20;
	w->client_route.text[i & (CLIENT_ROUTE_TEXT_MAX - 1)] = byte;
	/* No name has a zero, and exact routes end with it. */
	return !byte;
}

/* The group of the route that names hello.text; 0: there is none. Global (see event.h). */
__noinline __u32 hello_route(const struct service_table *t, const struct service *svc, __u32 kind)
{
	struct scratch *w = scratch();
	struct hello_scan s = {.w = w};
	struct client_route *key;
	const __u32 *group;
	__u32 length;

	if (!t || !svc || !w)
		return 0;
	key = &w->client_route;
	length = w->hello.text_length;
	if (!length || length > CLIENT_ROUTE_TEXT_MAX)
		return 0;
	__builtin_memset(key, 0, sizeof(*key));
	key->prefix = 8 * (sizeof(*key) - sizeof(key->prefix));
	key->service = svc->id;
	key->kind = kind;
	key->generation = t->generation & 1;
	/* The last step may be the one that found a zero. */
	if (bpf_loop(length, route_key_step, &s, 0) != length ||
	    !key->text[(length - 1) & (CLIENT_ROUTE_TEXT_MAX - 1)])
		return 0;
	group = bpf_map_lookup_elem(&client_routes, key);
	return group ? binding_now(*group) : 0;
}

/* The first name of a list of `length` bytes. Of a long one, the end: no route is longer. */
static __always_inline long read_server_name(const struct hello_scan *s, struct hello *h,
					     __u32 length)
{
	long list = hello_number(s->ctx, 2), kind = hello_number(s->ctx, 1);
	long bytes = hello_number(s->ctx, 2);

	if (list < 0 || kind < 0 || bytes < 0)
		return -1;
	if (bytes + 5 > length || kind != TLS_HOST_NAME || !bytes)
		return hello_refuse(h);
	if (bytes > CLIENT_ROUTE_TEXT_MAX && hello_skip(s->ctx, bytes - CLIENT_ROUTE_TEXT_MAX))
		return -1;
	if (hello_text(s->ctx, bytes < CLIENT_ROUTE_TEXT_MAX ? bytes : CLIENT_ROUTE_TEXT_MAX))
		return -1;
	h->name_length = bytes;
	h->by_name = hello_route(s->t, s->svc, CLIENT_ROUTE_SNI);
	return hello_skip(s->ctx, length - 5 - bytes);
}

static long protocol_step(__u32 i, void *arg)
{
	struct hello_scan *s = arg;
	struct hello *h = &s->w->hello;
	long bytes;

	(void)i;
	if (!h->list || h->by_alpn)
		return 1;
	bytes = hello_number(s->ctx, 1);
	if (bytes < 0)
		return 1;
	if (!bytes || (__u32)bytes + 1 > h->list)
		return hello_refuse(h) != 0;
	h->list -= bytes + 1;
	if (bytes > CLIENT_ROUTE_TEXT_MAX)
		return hello_skip(s->ctx, bytes) != 0;
	if (hello_text(s->ctx, bytes))
		return 1;
	h->by_alpn = hello_route(s->t, s->svc, CLIENT_ROUTE_ALPN);
	return 0;
}

/* Offered protocols, the preferred first: the first that has a route counts. */
static __always_inline long read_protocols(struct hello_scan *s, struct hello *h, __u32 length)
{
	long list = hello_number(s->ctx, 2);

	if (list < 0)
		return -1;
	if (list + 2 > length)
		return hello_refuse(h);
	h->list = list;
	bpf_loop(HELLO_PROTOCOLS, protocol_step, s, 0);
	if (h->outcome != HELLO_READ)
		return -1;
	return hello_skip(s->ctx, h->list + length - 2 - list);
}

static long extension_step(__u32 i, void *arg)
{
	struct hello_scan *s = arg;
	struct hello *h = &s->w->hello;
	long header;
	__u32 kind, length;

	(void)i;
	if (!h->extensions || !h->wanted)
		return 1;
	header = hello_number(s->ctx, 4);
	if (header < 0)
		return 1;
	kind = header >> 16;
	length = header & 0xffff;
	if (4 + length > h->extensions)
		return hello_refuse(h) != 0;
	h->extensions -= 4 + length;
	if (kind == TLS_SERVER_NAME && h->wanted & 1 << CLIENT_ROUTE_SNI) {
		h->wanted &= ~(1 << CLIENT_ROUTE_SNI);
		return read_server_name(s, h, length) || h->by_name;
	}
	if (kind == TLS_ALPN && h->wanted & 1 << CLIENT_ROUTE_ALPN) {
		h->wanted &= ~(1 << CLIENT_ROUTE_ALPN);
		return read_protocols(s, h, length) != 0;
	}
	return hello_skip(s->ctx, length) != 0;
}

/* Up to the extensions; -1: it ends before them. */
static __always_inline long read_fixed(struct xdp_md *ctx, struct hello *h)
{
	long value;

	h->message = 4;
	value = hello_number(ctx, 1);
	if (value < 0)
		return -1;
	if (value != TLS_CLIENT_HELLO)
		return hello_refuse(h);
	value = hello_number(ctx, 3);
	if (value < 0)
		return -1;
	if (value > HELLO_MAX)
		return hello_refuse(h);
	h->message = value;
	if (hello_skip(ctx, TLS_HELLO_FIXED))
		return -1;
	/* Session id, cipher suites, compression methods. */
	value = hello_number(ctx, 1);
	if (value < 0 || hello_skip(ctx, value))
		return -1;
	value = hello_number(ctx, 2);
	if (value < 0 || hello_skip(ctx, value))
		return -1;
	value = hello_number(ctx, 1);
	if (value < 0 || hello_skip(ctx, value) || !h->message)
		return -1;
	value = hello_number(ctx, 2);
	if (value < 0)
		return -1;
	if ((__u32)value > h->message)
		return hello_refuse(h);
	h->extensions = value;
	return 0;
}

/* Reads the ClientHello that the payload begins with to scratch.hello. Global (see event.h). */
__noinline int read_client_hello(struct xdp_md *ctx, const struct conn *c,
				 const struct service_table *t, const struct service *svc)
{
	struct scratch *w = scratch();
	struct hello_scan s = {.ctx = ctx, .w = w, .t = t, .svc = svc};
	struct hello *h;

	if (!w || !c || !t || !svc)
		return 0;
	h = &w->hello;
	__builtin_memset(h, 0, sizeof(*h));
	h->offset = c->payload;
	h->end = c->payload + c->payload_length;
	/* The name, even without such routes: people ask who it was. */
	h->wanted = 1 << CLIENT_ROUTE_SNI | (svc->client_routes & 1 << CLIENT_ROUTE_ALPN);
	if (!read_fixed(ctx, h))
		bpf_loop(HELLO_EXTENSIONS, extension_step, &s, 0);
	/* What is still to come may be of no account: the name is there, and it is all that routes ask for. */
	if (h->outcome == HELLO_MORE && (h->by_name || (h->name_length && !h->wanted)))
		h->outcome = HELLO_READ;
	return 0;
}

#endif /* MQTT_FWD_TLS_CLIENT_HELLO_H */
