/* SPDX-License-Identifier: GPL-2.0-only */
/* Who the client is, by its CONNECT, and the routes that name it. */
#ifndef MQTT_FWD_HANDSHAKE_CLIENT_H
#define MQTT_FWD_HANDSHAKE_CLIENT_H

#include "../learn/record.h"
#include "../mqtt/connect.h"
#include "../mqtt/topic_group.h"

/* Client ids and topics are hashed with the same secret, which never makes them equal. */
#define CLIENT_ID_DOMAIN 0x6964000000000000ULL

/* Who the client is: scratch.id, and for a new one scratch.client_id. Global (see event.h). */
__noinline int identify(struct xdp_md *ctx, const struct service_table *t,
			const struct service *svc)
{
	struct scratch *w = scratch();
	const struct connect *k;
	__u32 length, kept;

	if (!t || !svc || !w)
		return 0;
	k = &w->connect;
	length = k->id_length;
	w->id = 0;
	if (!k->has_id || !length || length > CLIENT_ID_MAX)
		return 0;
	w->id = text_hash(ctx, t->topic_key[0] ^ CLIENT_ID_DOMAIN ^ svc->id, t->topic_key[1], k->id,
			  length);
	w->client_id.service = svc->id;
	w->client_id.length = length;
	__builtin_memset(w->client_id.text, 0, sizeof(w->client_id.text));
	kept = length < CLIENT_ID_TEXT_MAX ? length : CLIENT_ID_TEXT_MAX;
	frame_copy(ctx, k->id, w->client_id.text, kept, CLIENT_ID_TEXT_MAX);
	return 0;
}

/* The group of the route that names the client id, or the user name, of scratch.connect; 0: none does. Global (see event.h). */
__noinline __u32 client_route(struct xdp_md *ctx, const struct service_table *t,
			      const struct service *svc, __u32 kind)
{
	struct scratch *w = scratch();
	struct client_route *key;
	const __u32 *group;
	__u32 offset, length;

	if (!t || !svc || !w)
		return 0;
	key = &w->client_route;
	offset = kind == CLIENT_ROUTE_ID ? w->connect.id : w->connect.user;
	length = kind == CLIENT_ROUTE_ID ? w->connect.id_length : w->connect.user_length;
	if (!length)
		return 0;
	if (length > CLIENT_ROUTE_TEXT_MAX)
		length = CLIENT_ROUTE_TEXT_MAX;
	__builtin_memset(key, 0, sizeof(*key));
	key->prefix = 8 * (sizeof(*key) - sizeof(key->prefix));
	key->service = svc->id;
	key->kind = kind;
	key->generation = t->generation & 1;
	if (!frame_copy(ctx, offset, key->text, length, CLIENT_ROUTE_TEXT_MAX))
		return 0;
	group = bpf_map_lookup_elem(&client_routes, key);
	return group ? binding_now(*group) : 0;
}

/* One rule: client id before user name, and both before topics; the longest match of each. */
static __always_inline binding_t route_of_client(struct xdp_md *ctx, const struct connect *k,
						 const struct service_table *t,
						 const struct service *svc)
{
	binding_t binding = 0;

	if (svc->client_routes & 1 << CLIENT_ROUTE_ID && k->has_id)
		binding = client_route(ctx, t, svc, CLIENT_ROUTE_ID);
	if (!binding && svc->client_routes & 1 << CLIENT_ROUTE_USER && k->has_user)
		binding = client_route(ctx, t, svc, CLIENT_ROUTE_USER);
	return binding;
}

#endif /* MQTT_FWD_HANDSHAKE_CLIENT_H */
