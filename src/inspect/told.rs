//! Counters that `doctor` speaks of.

/// What the counters tell, each with what usually makes them grow.
pub(super) const TOLD: [(&str, &str, &str); 15] = [
    (
        "no_balancer",
        "packets found no balancer, and went to this host's stack",
        "start it; `mqtt-fwd status`",
    ),
    ("no_group_vip", "packets found no group", "`mqtt-fwd apply`"),
    (
        "will_elsewhere",
        "clients had a will whose topic belongs to another group than their messages: its subscribers may not get it",
        "a relay has a connection to each group: docs/relay.md",
    ),
    (
        "connect_delayed",
        "CONNECTs were dropped, to be repeated: too many new connections at a time, of all or of one address",
        "if these are clients of yours, raise [maps] handovers",
    ),
    (
        "rate_limited",
        "segments were dropped, to be repeated: their clients are above what [limits] lets them do",
        "raise it, if these clients may do that",
    ),
    (
        "untracked_dropped",
        "segments of no known connection were dropped: the one before was lost on its way, the balancer lost its state, or somebody guesses",
        "they go on when repeated; docs/security.md",
    ),
    (
        "too_big",
        "packets were too large to be wrapped, and answered with ICMP",
        "`mqtt-fwd host up` on broker hosts advertises an MSS that avoids them",
    ),
    (
        "not_mqtt",
        "flows did not begin with CONNECT: TLS on this port?",
        "a relay speaks TLS and WebSocket: docs/relay.md",
    ),
    (
        "tls_on_plain",
        "clients spoke TLS to a service that does not",
        "protocol = \"tls\" in a service of its own, or a relay's listener: docs/tls.md",
    ),
    (
        "fallback_hello_cut",
        "TLS clients were bound without the server name that they asked for: it did not come in time",
        "`run` reads names that come in a second segment: is it up, and has it time?",
    ),
    (
        "malformed",
        "control packets were malformed",
        "`mqtt-fwd events` names the clients (unframed)",
    ),
    ("map_full", "flows or clients could not be stored", "raise the maps in [maps], restart `run`"),
    (
        "flow_evicted",
        "flows lost their entries while in use",
        "raise `flows` in [maps], restart `run`",
    ),
    (
        "unjudged",
        "PUBLISHes were not judged: too many topics in a segment",
        "clients that do that belong to a relay",
    ),
    (
        "publish_lost",
        "PUBLISHes were lost: their connections were bound to another group",
        "binding = \"delayed\", a relay, or both: docs/delayed-binding.md, docs/relay.md",
    ),
];
