"""The cloud as a directory: `virgo mount /mnt/virgo`.

    filesystem   a handler for each operation of the kernel
    table        nodes, names and open files that the kernel knows of, for all workers
    local        a tree on this machine: every operation is the kernel's own
    opens        open files: passed through, or at hand
    counters     what was done, counted in memory that all can see
    process      the processes of a mount: one that looks after it, and workers that answer
    control      mounts from outside: start, find, stop

The processes are not the node's: the node never waits for its own mount, and a mount outlives the node.
"""
