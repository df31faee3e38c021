"""The one wire: RESP on every port and socket of a node.

    resp        values to bytes: what a server answers
    framing     bytes to requests: RESP arrays, inline commands, the reference's text form
    address     where a node listens, and how to reach it
    args        arguments of requests, checked
    text        a typed line as a request
    peer        who is at the other end
    auth        who asks: peer credentials, tokens, certificates, and the roles of each
    tokens      the files in which tokens are kept
    authority   certificates of a cloud: made and read
    tls         contexts that accept them
    commands    what a port serves: a table of commands with role and arity
    common      what every port answers
    hooks       what commands hang into a session
    refusals    errors that a session makes itself
    session     one connection: order, deadlines, back-pressure
    answers     of a connection, in the order of its requests
    batches     of a chunk of requests, made final together
    runs        requests of a pipeline that are alike
    speech      how a port's protocol is read and answered
    server      listeners
    wakeful     who looks for the next byte before it sleeps
    crowd       what all connections hold together
    door        strangers at a TLS port
    call        a request with the meaning of its answer, shared by both clients
    life        whether a silent node lives
    pool        what both clients share
    connection  one blocking connection
    client      the blocking client
    aclient     the asyncio client
    near        the connection of this process, for objects that arrive by pickle

Coding is done in C by hiredis on both ends.
"""
