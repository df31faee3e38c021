"""Files of every node, by path from everywhere: `virgo_open`, `virgo_read`, `virgo_write`, `virgo_close`.

    core         where a path leads and what a mode allows: pure decisions
    beneath      opening and changing files that never leads out of a root
    descriptors  the table of open files, which outlives the process
    local        the files of this node: blocking work, no network
    placement    the pool: which node holds a placed path
    posix        what can be done to files and names, by descriptors; acts is that for who asks from elsewhere
    service      the module in the node: commands, forwarding, threads
    client       what users hold; file objects are in `stream`
    aclient      the same for asyncio; file objects are in `astream` and `atext`
    fs           the same for who knows fsspec: `virgo://`
    mount        the same as a directory of the kernel: `virgo mount`
    calls        what both send; `cursor` has the position and mode of both kinds of file objects

`/NODE/...` is the private directory of that node, `/NODE/EXPORT/...` a directory that its configuration
exports, and every other path is placed in the pool: `/pool/a`, `/a` and `a` are the same file, on the node
that a placement rule names, or else on the one that had most room when the file was created.
"""
