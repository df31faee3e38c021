"""The processor pool: run a call on the least loaded node, in a warm process of its own.

    placement  decides which node runs a call: no I/O, no clock
    core       decides which worker of a node runs it, the same way
    exports    functions that may be called by name, and `@virgo.export`
    programs   programs that may be called by name
    messages   calls and outcomes as bytes, shared by clients, nodes and workers
    template   the process of a node that forks its workers
    worker     one worker: runs one call at a time
    processes  the processes behind the workers
    pool       the workers of a node
    mailbox    calls handed in many at once, their outcomes collected as they come
    dispatch   the way of a call from node to node to worker
    published  functions that the whole cloud has
    service    the module of the node
    channel    many calls in flight of one client
    shipping   functions as bytes
    client     what users hold: `cloud.cpu`

A call runs at most once, unless `retries=` says that it may be repeated. Every failure says its cause.
"""
