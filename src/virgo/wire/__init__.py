"""The one wire: RESP on every port and socket of a node.

    resp        values to bytes: what a server answers
    framing     bytes to requests: RESP arrays, inline commands, the reference's text form
    address     where a node listens, and how to reach it
    auth        who asks: peer credentials, tokens, certificates, and the roles of each
    tokens      the files in which tokens are kept
    authority   certificates of a cloud: made and read
    tls         contexts that accept them
    commands    what a port serves: a table of commands with role and arity
    session     one connection: order, deadlines, back-pressure
    server      listeners
    call        a request with the meaning of its answer, shared by both clients
    life        whether a silent node lives
    pool        what both clients share
    connection  one blocking connection
    client      the blocking client
    aclient     the asyncio client

Coding is done in C by hiredis on both ends.
"""
