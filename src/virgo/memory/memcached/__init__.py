"""The protocols of memcached, classic and meta, over the cloud's keys.

Decisions, without I/O:

    numbers   numbers, times and base64 as memcached reads them
    classic   lines of the classic protocol, made requests
    meta      lines of the meta protocol, made requests
    reader    bytes of a connection, made requests
    replies   errors as the protocol says them

Commands, where the key is:

    uses      who was fetched, and when: kept in the node's own memory
    items     the classic commands, given a batch and a request
    flagged   the meta commands, likewise
    dump      all items of this node, page by page

and on the node that the client has reached:

    front     passes requests to where their keys are, and counts
    figures   what was counted, in the words of `stats`
    place     where it listens, and who may come

A request is a list of bytes that means the same on the listener and between nodes: the name of a command
below `MEMORY.MC.`, then its arguments. The answer is what the client will see, so that a node passes it on
as it is.
"""
