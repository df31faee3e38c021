"""The memory pool: regions by id and keys by name, on any node, at local speed.

core      pure decisions: chunks, placement, slots, records
life      what outlasts even the loss of a store: whose boot wrote it, what ids it gave
store     one node's LMDB environment
batch     the transaction of a chunk of requests
slots     which node holds a key
strings   the key commands where the key is, as Redis answers them
keys      the key commands on any node
regions   VIRGO_MALLOC, VIRGO_SET, VIRGO_GET, VIRGO_FREE
chunks    pieces of large regions, here and on other nodes
spread    regions larger than a chunk, over many nodes
service   the node's module
mapped    a node's store as mapped by processes of its machine
calls     requests and the meaning of their answers
client    what users hold, blocking
aclient   the same for asyncio
"""
