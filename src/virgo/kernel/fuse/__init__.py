"""File systems of our own, through /dev/fuse: the kernel's protocol without a library in between.

    protocol   the messages: numbers, flags and layouts, as of FUSE 7.45
    device     /dev/fuse: mounting, further descriptors, files passed through, and what the kernel is told
    serving    threads that read requests and answer them

A file system is a set of handlers by operation; `virgo.files.mount` is the one of the cloud.
"""
