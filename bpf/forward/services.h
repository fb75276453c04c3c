/* SPDX-License-Identifier: GPL-2.0-only */
/* Which service a packet is for, if any. */
#ifndef MQTT_FWD_SERVICES_H
#define MQTT_FWD_SERVICES_H

#include "../lib/parse.h"
#include "../maps/config.h"
#include "flow/conn.h"
#include "emit.h"

/* The current generation of services and routes. */
static __always_inline const struct service_table *current_table(void)
{
	__u32 zero = 0, side;
	const __u32 *current = bpf_map_lookup_elem(&generation, &zero);

	if (!current)
		return NULL;
	side = READ_ONCE(*current) & 1;
	return bpf_map_lookup_elem(&services, &side);
}

static __always_inline const struct service *service_at(const struct service_table *t, __u32 slot)
{
	return slot < MAX_SERVICES ? &t->service[slot & (MAX_SERVICES - 1)] : NULL;
}

static __always_inline const struct service *service_find4(const struct service_table *t,
							   __be32 addr, __be16 port)
{
	__u64 key = addr | (__u64)port << 32;
	__u32 found = MAX_SERVICES;

	/* Not leaving the loop early keeps it one path for the verifier, not one a service. */
	for (__u32 i = 0; i < MAX_SERVICES; i++) {
		if (i >= t->v4)
			break;
		if (t->v4_key[i] == key)
			found = t->service[i].slot;
	}
	return service_at(t, found);
}

static __always_inline bool addr6_equal(const __be32 a[4], const __be32 b[4])
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

static __always_inline const struct service *service_find6(const struct service_table *t,
							   const __be32 addr[4], __be16 port)
{
	__u32 found = MAX_SERVICES;

	for (__u32 i = 0; i < MAX_SERVICES; i++) {
		if (i >= t->count)
			break;
		if (i >= t->v4 && t->service[i].port == port &&
		    addr6_equal(t->service[i].addr, addr))
			found = t->service[i].slot;
	}
	return service_at(t, found);
}

/* The service at the address that `c` has in the place of the client's: its slot, else MAX_SERVICES. Global (see event.h). */
__noinline __u32 service_slot(const struct service_table *t, const struct conn *c, __u32 port)
{
	const struct service *svc;

	if (!t || !c)
		return MAX_SERVICES;
	svc = c->v6 ? service_find6(t, c->key.addr, port) : service_find4(t, c->key.addr[0], port);
	return svc ? svc->slot : MAX_SERVICES;
}

/*
 * Whether it is a group's address and port that `c` has in the place of the client's address. A service's other
 * listeners have VIPs of its own address, which clients do send to. Global (see event.h).
 */
__noinline int is_group_vip(const struct conn *c, __u32 port)
{
	struct vip_definition vip = {.port = port, .proto = IPPROTO_TCP};
	const struct vip_definition *service;

	if (!c)
		return false;
	__builtin_memcpy(vip.addr, c->key.addr, sizeof(vip.addr));
	service = bpf_map_lookup_elem(&vip_inner_dst, &vip);
	return service && !addr6_equal(service->addr, vip.addr);
}

/* A segment for no service: not for a group past this program, where nobody would look at it. */
static __always_inline int verdict_of_other(const struct conn *c, __be16 port)
{
	if (!is_group_vip(c, port))
		return unchanged(REASON_NOT_SERVICE);
	count(REASON_GROUP_VIP);
	return XDP_DROP;
}

#endif /* MQTT_FWD_SERVICES_H */
