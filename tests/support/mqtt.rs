//! MQTT control packets, as clients send them.

/// Remaining length (MQTT 3.1.1 §2.2.3).
pub fn varint(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let byte = (n % 128) as u8;
        n /= 128;
        if n == 0 {
            bytes.push(byte);
            return bytes;
        }
        bytes.push(byte | 0x80);
    }
}

pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    [&[first], varint(body.len()).as_slice(), body].concat()
}

pub fn text(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

/// Protocol level 3 (3.1), 4 (3.1.1) or 5.
pub fn connect(level: u8) -> Vec<u8> {
    connect_as(level, 0x02, b"client", &[])
}

/// With flags (MQTT 3.1.1 §3.1.2.3), a client id, and whatever texts the flags ask for.
pub fn connect_as(level: u8, flags: u8, id: &[u8], texts: &[&[u8]]) -> Vec<u8> {
    let name: &[u8] = if level == 3 { b"MQIsdp" } else { b"MQTT" };
    let mut body = text(name);
    body.extend([level, flags, 0, 60]);
    if level == 5 {
        body.push(0); // no properties
    }
    body.extend(text(id));
    for t in texts {
        body.extend(text(t));
    }
    packet(0x10, &body)
}

/// QoS 0, 1 or 2, without properties (3.1, 3.1.1).
pub fn publish(topic: &[u8], qos: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = text(topic);
    if qos > 0 {
        body.extend([0, 7]);
    }
    body.extend(payload);
    packet(0x30 | qos << 1, &body)
}

/// QoS 0, MQTT 5, without properties.
pub fn publish5(topic: &[u8], payload: &[u8]) -> Vec<u8> {
    packet(0x30, &[&text(topic), &[0][..], payload].concat())
}

/// MQTT 5, with a topic alias; an empty topic stands for what the alias was before.
pub fn publish_alias(topic: &[u8], alias: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = text(topic);
    body.extend([3, 0x23]);
    body.extend(alias.to_be_bytes());
    body.extend(payload);
    packet(0x30, &body)
}

pub fn subscribe(filter: &[u8]) -> Vec<u8> {
    packet(0x82, &[&[0, 9], text(filter).as_slice(), &[0]].concat())
}

pub fn pingreq() -> Vec<u8> {
    packet(0xc0, &[])
}

pub fn puback() -> Vec<u8> {
    packet(0x40, &[0, 7])
}

pub fn disconnect() -> Vec<u8> {
    packet(0xe0, &[])
}
