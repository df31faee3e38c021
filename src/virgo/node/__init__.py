"""A node: the process that makes a machine part of the cloud.

daemon      one node process: engine, modules, listeners, in the order of need
modules     modules found, ordered, started, restarted
membership  who is in the cloud, decided from beats (view: the pure part)
peers       calls to other nodes, and their bounded failure
commands    what every node answers beside its modules
supervisor  `virgo up`: the engine and the nodes of a machine, watched and restarted
control     start, find and stop what `virgo up` runs, from outside
"""
