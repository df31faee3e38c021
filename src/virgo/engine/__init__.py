"""Consensus, replication and durability, from NATS JetStream; nothing of it is made by hand.

base       what modules need of an engine: logs, registers, leases, signals
nats       these, on NATS JetStream: `connect`
link       the connection; with its neighbours the only place that imports nats
jetstream  streams, guarded writes, reads by the leader
server     the embedded nats-server: configuration, start, adoption, watch, stop
audit      refuses an engine whose settings can lose acknowledged data
"""
