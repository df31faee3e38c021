"""What the Linux kernel offers without a patch, each facility behind a few plain functions.

at          calls on files that Python's os lacks: handles, holes, entries, descriptors of other processes
fuse        file systems of our own, through /dev/fuse
load        pressure, run queue, memory and disk of this machine
ports       who holds a TCP port, and which ports the kernel gives away by itself
process     processes by pid and start time, so that no signal hits a stranger
systemd     readiness and watchdog notifications, and the unit of a node
"""
