"""The memory pool: regions by id and keys by name, on any node, at local speed.

Decisions, without I/O:

    core          regions: chunks, placement, room
    keyspace      keys: slots, records, patterns
    keeping       keys that are durable, or on two nodes; who succeeds a lost node
    spaces        namespaces and their generations
    decimals      sums as INCRBYFLOAT makes them

A node's store, an LMDB environment that several processes write:

    tables        as a process has it open: room, errors, what others have written
    ground        the blocks under its file, taken before they are used
    heads         what LMDB says in the heads of its file
    condense      its file written anew, when free pages lie about
    snapshot      what is read in a transaction
    batch         a transaction on keys and values
    owner         what only the node does in one
    sketch        how often keys were used, counted by all processes
    eviction      which keys of caches are forgotten
    keeper        sends changed keys to where they are kept as well
    durable       to a second store on disk
    store         the node's: made, opened, closed
    life          what outlasts even its loss: whose boot wrote it, what ids it gave
    writers       which processes may be writing
    guard         lets stopped writers finish
    mapped        the store as clients of the machine map it
    maps          of a process, one for each store, and none across a fork
    recall        what was read there and surely still is so
    held          a value where it lies there

Commands on keys, where the key is:

    entries       what they share: what is there now, how arguments are read
    strings, expiry, generic, versioned, fills
    verbs         the table of them

and from any node:

    slots         which node holds a key
    keys          commands on named keys
    listing       commands on all keys
    transactions  MULTI, EXEC, WATCH
    namespaces    declared and dropped, known to all nodes
    mirrors       second copies, and what becomes of them when a node is lost
    remote        values of other nodes that are read often

Regions:

    regions       VIRGO_MALLOC, VIRGO_SET, VIRGO_GET, VIRGO_FREE
    chunks        pieces of large regions, here and on other nodes
    spread        regions larger than a chunk, over many nodes
    kept          regions that are durable, or on two nodes
    shared        regions that are files in shared memory, on their node
    shelf         the directory in which these lie
    turns         who waits for which region, in threads of their own

Shared regions as every process of the machine has them:

    segments      one file: its bytes, what keeps them whole, the lease
    descriptors   that carry locks, and are not for forked children
    leases        which segments are near, views, the right to write in place
    aleases       leases of tasks
    arrays        NumPy arrays in them

And: `service`, the node's module; `memcached`, memcached's protocols over the keys; `overview` and `figures`,
what is shown of the pool; `calls` and `regioncalls`, requests and the meaning of their answers. What users
hold: `client`, with `mapping` for keys, and `region`; `reach`, how it gets there; `aclient`, `amapping`,
`aregion`, the same for asyncio.
"""
