"""The cloud as a directory: `virgo mount /mnt/virgo`.

    filesystem   a handler for each operation of the kernel
    table        nodes, names and open files that the kernel knows of, for all workers
    shown        what is mounted: nodes, their exports, the pool; listing gives their entries
    tree         what a tree must be able to do
    local        a tree on this machine: every operation is the kernel's own; opens has its open files
    remote       a tree of another machine: acts on its node, by far; remoteopens has its open files
    pool         the tree whose files lie where the cloud has placed them
    counters     what was done, counted in memory that all can see
    process      the processes of a mount: one that looks after it, and workers that answer
    control      mounts from outside: start, find, stop

The processes are not the node's: the node never waits for its own mount, and a mount outlives the node.
"""
