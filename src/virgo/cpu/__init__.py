"""The processor pool: run a call on the least loaded node, in a warm process of its own.

    placement  decides which node runs a call: no I/O, no clock
    core       decides which worker of a node runs it, the same way
    needs      processors, GPUs and memory that calls ask for
    stock      a node's GPUs and memory
    ceiling    keeps a call to what it was granted
    deaths     why a worker has died
    outputs    what calls have written
    running    a call, or a lease, as the pool has it
    recalls    takes leases back for who waits
    kills      ends calls for others than their callers
    sight      answers what runs, and what a call has written, as `seen` says it
    durations  how long calls take
    line       who waits, by priority
    exports    functions that may be called by name, and `@virgo.export`
    programs   programs that may be called by name
    messages   calls and outcomes as bytes, shared by clients, nodes and workers
    arguments  arguments as bytes
    template   the process of a node that forks its workers
    worker     one worker: runs one call at a time
    outcomes   what running a call comes to
    processes  the processes behind the workers
    pool       the workers of a node
    seating    who gets a place on which node, and who waits for one
    flow       calls that write faster than their output is read
    traces     what calls leave in a worker's process
    mailbox    calls handed in many at once, their outcomes collected as they come
    dispatch   the way of a call from node to node to worker
    freight    large buffers between machines
    published  functions that the whole cloud has
    service    the module of the node

Leases, by which clients of a node's machine reach its workers without the node:

    slate      the page on which worker, client and node see how far the worker is
    hiring     a lease as the pool sees it
    leases     a node's leases, by client
    leased     a worker that is leased
    lane       a leased worker, as its client sees it
    contact    a node, as a client who leases workers of it knows it
    bench      the workers that a client leases and the calls that wait for them
    hires      how it comes by more of them
    ends       deadlines, cancelling, workers that die
    crew       sends the calls, sets the outcomes
    lessee     which way a client's calls go

On the client's side:

    tasks      what a user asks for, with its options
    near       where the data of a call are
    calls      tasks, calls of them, who waits for them
    futures    futures, runs, streams
    shipping   functions and arguments as bytes
    apart      large buffers beside what is pickled
    segments   shared memory for them; `landing` where they land that come through a node
    channel    many calls in flight of one client through a node
    follow     what a call writes, for its caller; `afollow` for asyncio
    maps       one function over many arguments
    client     what users hold: `cloud.cpu`
    aclient    the same for asyncio; `desk` takes outcomes to its event loop
    command    a command line as a call
    backends   callables on a Ray or Dask cluster
    joblib_backend   for joblib and scikit-learn

A call runs at most once, unless `retries=` says that it may be repeated. Every failure says its cause.
"""
