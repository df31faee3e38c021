"""Every bound in one place, each with its reason. Units are last in the name.

Nothing here is a tuning knob of the data path; what an installation wants to change is in
`virgo.config`. A request that meets a bound gets a typed error, never a cut-off result.
"""

from __future__ import annotations

from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

# --- wire -----------------------------------------------------------------------------------
# One request may hold a whole value (1 GiB, as memcached allows) plus its command and context.
REQUEST_BYTES_MAX: Final = 1 * GiB + 1 * MiB
# Before AUTH a stranger gets no more room than a login needs.
REQUEST_UNAUTHENTICATED_BYTES_MAX: Final = 16 * KiB
# Arguments of one request: MSET of half a million pairs, as Redis allows (1024 * 1024).
REQUEST_ARGUMENTS_MAX: Final = 1024 * KiB
# A typed line is read by people and telnet; Redis has the same bound.
INLINE_BYTES_MAX: Final = 64 * KiB
# Requests of one connection that may be unanswered at once; past it the socket is not read.
PIPELINE_DEPTH_MAX: Final = 100_000
# Requests of a pipeline that are handled by one call of their command.
RUN_REQUESTS_MAX: Final = 128
# Bytes of complete requests that wait behind one that is being awaited; past it likewise.
QUEUED_BYTES_MAX: Final = 64 * MiB
# After the client's last byte, the time in which running requests may still be answered.
EOF_GRACE_S: Final = 2.0
# Concurrent calls (clones) in flight on one connection; past it the socket is not read.
CONCURRENT_CALLS_MAX: Final = 1_000
# Reply bytes waiting for a slow reader before its connection is no longer read ...
OUTPUT_PAUSE_BYTES: Final = 1 * MiB
# ... and for how long it may refuse to drain before it is closed.
OUTPUT_STALL_S: Final = 60.0
# Before it sleeps, who waits for a byte looks for it for so long ...
AWAKE_S: Final = 0.00015
# ... if the one before has come within this time, which is that and two wake-ups.
SOON_S: Final = 0.0003
# A connection that has not authenticated in this time is closed.
LOGIN_S: Final = 30.0
# An authenticated connection idle for this long is closed; pools reconnect without a word.
IDLE_S: Final = 3600.0
# Connections of one listener ...
CONNECTIONS_MAX: Final = 10_000
# ... and of all that come by TCP together: the process's descriptors but for these, which it needs itself.
DESCRIPTORS_RESERVED: Final = 2_500
# Connections of one TLS port that have not shown a certificate yet, and the time that each has for it.
HANDSHAKES_MAX: Final = 500
HANDSHAKE_S: Final = 5.0
# What all connections of a node may hold in requests and answers: this share of the machine's memory (or of
# the control group's), for what they hold is copied once or twice on its way ...
CROWD_MEMORY_SHARE: Final = 0.25
# ... but one value of this size at least.
CROWD_BYTES_MIN: Final = 64 * MiB
# How old the sum of that may be: to look at 10,000 connections takes milliseconds.
CROWD_LOOK_S: Final = 0.02
# Requests and answers from this size on are looked at closely.
CROWD_LOOK_BYTES: Final = 1 * MiB
# Default deadline of a client's request: long enough for a slow disk, short enough to notice.
REQUEST_DEADLINE_S: Final = 30.0
# A connection attempt to a peer; a dead host must be named within NODE_LOST_S.
CONNECT_S: Final = 2.0
# A client that has waited so long without a byte from its node asks on another connection whether the node
# lives, and asks again after each such silence ...
LIFE_QUIET_S: Final = 1.0
# ... and believes it lost after so much more. The two stay below NODE_LOST_S. Nearly all of it is for the
# answer, which costs a question a second during long calls, but forgives a node whose event loop one value
# of 1 GiB holds up for 1 to 2 s.
LIFE_ANSWER_S: Final = 3.25
# How often a waiting client looks at what another of its connections has found out meanwhile.
LIFE_LOOK_S: Final = 0.25
# Processor time within LIFE_ANSWER_S that shows a silent process of this machine to be at work: some times
# what an idle node uses meanwhile (10 to 20 ms).
LIFE_WORK_S: Final = 0.05
# Connections kept idle per peer by a client's pool.
POOL_IDLE_MAX: Final = 16

# --- security -------------------------------------------------------------------------------
# 256 bits: beyond guessing, so that no delay after a wrong token is needed.
TOKEN_RANDOM_BYTES: Final = 32
# A token that a user wrote by hand must not be guessable over a fast wire either.
TOKEN_CHARS_MIN: Final = 16
# A token's file: longer ones are some other file.
TOKEN_FILE_BYTES_MAX: Final = 4 * KiB
# Each login may look at all of them.
TOKENS_MAX: Final = 1_000
# An authority outlives the machines that it was made for; certificates are renewed meanwhile.
AUTHORITY_DAYS: Final = 3650
CERTIFICATE_DAYS: Final = 730
# Certificates are valid from a little before they are made: clocks of machines differ.
CERTIFICATE_BACKDATE_S: Final = 3600
# Names and addresses of one machine.
CERTIFICATE_HOSTS_MAX: Final = 100

# --- membership -----------------------------------------------------------------------------
# A node says it lives once a second ...
MEMBER_BEAT_S: Final = 1.0
# ... and is dead for the others after three missed beats, so that a death is seen within 5 s.
MEMBER_LEASE_S: Final = 3.5
# A node's event loop may be busy for so long, with a value of a gigabyte for example, before the node counts
# as hung; until then a thread of its own beats for it.
BUSY_S_MAX: Final = 15.0
# The promise to callers: a lost node is an error within this time.
NODE_LOST_S: Final = 5.0
# 15 bits of every id name its node, and a number is never given to a second node.
NODES_MAX: Final = 32_767
NAME_CHARS_MAX: Final = 63
# Nodes of one machine are for trying things out: each is several processes and six ports.
LOCAL_NODES_MAX: Final = 64
# The highest base port is 64000, and none is beyond 65535; further nodes of a machine take one more each.
PORT_OFFSET_MAX: Final = 1_535

# --- memory ---------------------------------------------------------------------------------
# The piece in which large regions are spread over nodes; also one message between nodes.
MEMORY_CHUNK_BYTES: Final = 4 * MiB
# The largest region: a value is held whole in a request.
MEMORY_REGION_BYTES_MAX: Final = 1 * GiB
# LMDB's compiled-in bound on a key.
MEMORY_KEY_BYTES_MAX: Final = 500
# The longest value of a key; with it a request still has room for the key and options.
MEMORY_VALUE_BYTES_MAX: Final = 1 * GiB
# Slots that keys hash to; a slot is the unit of placement. 2 bytes each in one register.
MEMORY_SLOTS: Final = 4096
# With those of keys that are kept on two nodes, which come after them.
MEMORY_SLOTS_ALL: Final = 2 * MEMORY_SLOTS
# Slots that a node takes beyond those wanted, so that loading many keys costs tens, not thousands, of
# engine writes; small enough that several nodes loading at once share the table.
MEMORY_SLOTS_AHEAD: Final = 64
# Chunks in flight for one get or set of a spread region: enough to keep several nodes busy, and with the
# chunk size a bound on what one request adds to the node's own memory.
MEMORY_CHUNKS_PARALLEL: Final = 8
# Nodes asked for their room before a spread region is placed; the freest by their last report.
MEMORY_NODES_ASKED_MAX: Final = 64
# Attempts to place a set's chunks on other nodes when some turn out lost or full.
MEMORY_PLACE_ATTEMPTS_MAX: Final = 5
# Attempts of a get that concurrent sets overtake, before it takes its turn among them.
MEMORY_GET_ATTEMPTS_MAX: Final = 3
# Processes and threads that may read one node's mapped store at once; 64 bytes each.
MEMORY_READERS_MAX: Final = 4096
# Slots of readers that died are freed this often; until then what they saw is kept.
MEMORY_READERS_CHECK_S: Final = 10.0
# For so long the node waits for the right to write its store before it looks for stopped clients ...
MEMORY_WRITER_WAIT_S: Final = 0.1
# ... and for so long before it kills them: within NODE_LOST_S the others would take the node for lost.
MEMORY_WRITER_KILL_S: Final = 2.0
# Chunks whose set died midway are looked for this often.
MEMORY_SWEEP_S: Final = 60.0
# Regions that a sweep asks a home about in one request.
MEMORY_SWEEP_REGIONS_MAX: Final = 1_000
# Keys past their time are invisible at once and removed in rounds of this many ...
MEMORY_EXPIRE_KEYS_MAX: Final = 1_000
# ... this often.
MEMORY_EXPIRE_S: Final = 1.0
# Ids are reserved on disk in blocks, so that none is given twice even if the pool itself is lost.
MEMORY_SERIALS_BLOCK: Final = 1_000_000
# A shared region is mapped, so the largest one is as large as the largest pool.
MEMORY_SEGMENT_BYTES_MAX: Final = 1024 * GiB
# What is said of a shared region, the shape of an array for example: it lies in the region's record.
MEMORY_NOTE_BYTES_MAX: Final = 2 * KiB
# A write of a shared region takes so long at most (that of 1 GiB takes about one second); who still keeps the
# others out then is stopped.
MEMORY_SEGMENT_WAIT_S: Final = 3.0
# Threads of a node in which shared regions are read and written. A region whose writer is stopped takes one
# of them for so long, whoever asks for it.
MEMORY_SEGMENT_THREADS_MAX: Final = 32
# A task that waits for another one's lease of the same array looks this often.
MEMORY_LEASE_POLL_S: Final = 0.002
# A directory for segments that was made so long ago and has no owner yet is nobody's.
MEMORY_SEGMENTS_STRAY_S: Final = 60.0
# Attempts to move a key to another node while others set it anew.
MEMORY_RENAME_ATTEMPTS_MAX: Final = 100
# Between MULTI and EXEC: a transaction holds up all others while it runs, and is kept in memory until then.
MEMORY_QUEUED_COMMANDS_MAX: Final = 100_000
MEMORY_QUEUED_BYTES_MAX: Final = 1 * GiB
# Values of one answer to MGET together: as much as one value may have.
MEMORY_REPLY_BYTES_MAX: Final = 1 * GiB
# All namespaces are one register of the engine, which each node reads when it starts ...
MEMORY_SPACES_MAX: Final = 4_000
# ... so their names are short.
MEMORY_SPACE_NAME_BYTES_MAX: Final = 100
# A node that was cut off when a namespace was dropped hears of it so much later at most.
MEMORY_SPACES_REFRESH_S: Final = 5.0
# Keys of dropped namespaces are removed in rounds of this many, between which others have their turn.
MEMORY_SWEEP_KEYS_MAX: Final = 1_000
# How often the keys were used that may be evicted, a byte for each value of a hash: with a million keys few
# share one.
MEMORY_SKETCH_BYTES: Final = 4 * MiB
# Who fills a key names himself by so many bytes at most.
MEMORY_CLAIM_TOKEN_BYTES_MAX: Final = 64
# Claims to fill a key that nobody took up are removed in rounds of this many.
MEMORY_CLAIMS_TIDIED_MAX: Final = 1_000
# What is evicted at once at least, so that a full cache does not look for room with each key: this ...
MEMORY_EVICT_BYTES_MIN: Final = 256 * KiB
# ... or this share of the pool, if that is more.
MEMORY_EVICT_SHARE: Final = 1 / 256
# After a round that found nothing to evict, none is begun for so long: it takes milliseconds.
MEMORY_EVICT_AGAIN_S: Final = 1.0
# Keys looked at for one eviction before any that may be evicted will do, so that no change takes long.
MEMORY_EVICT_LOOKS_MAX: Final = 20_000
# Copies of keys that are sent to another node in one message, unless one value alone is more.
MEMORY_COPY_BYTES_MAX: Final = 4 * MiB
# How often a node looks whether it has to take over keys that are kept twice, or to find a mirror for them.
MEMORY_MIRRORS_LOOK_S: Final = 1.0
# A node whose pool or disk was full is not asked to take copies for so long.
MEMORY_MIRRORS_UNABLE_S: Final = 60.0
# Slots whose keys are sent to a new mirror together: what it remembers meanwhile is bounded by their keys.
MEMORY_SYNC_SLOTS: Final = 64
# A request for keys that are kept twice waits so long for the mirror to take over from a lost node: its
# lease, two looks, and time to spare.
MEMORY_TAKEOVER_S: Final = 9.0
# The table of their slots is read again before a request is passed on, unless it was read this recently.
MEMORY_TABLE_FRESH_S: Final = 0.1
# With more lists of free pages than this a store is condensed: to place a long value in it takes seconds ...
MEMORY_FREE_RECORDS_MAX: Final = 20_000
# ... if what counts in it is no more than this, which is copied in about a second ...
MEMORY_CONDENSE_BYTES_MAX: Final = 1 * GiB
# ... and not more often than this.
MEMORY_CONDENSE_AGAIN_S: Final = 60.0
# What a client process remembers of values that it has read by mapping, for each mapping of keys ...
MEMORY_RECALL_BYTES_MAX: Final = 16 * MiB
# ... up to this size: a longer one takes longer to use than to copy anew.
MEMORY_RECALL_VALUE_BYTES_MAX: Final = 1 * MiB
# Values of other nodes that are read often are kept from this size on: a smaller one costs no more to send
# than to ask for its version ...
MEMORY_REMOTE_VALUE_BYTES_MIN: Final = 16 * KiB
# ... up to so many bytes together ...
MEMORY_REMOTE_BYTES_MAX: Final = 256 * MiB
# ... and this share of the pool.
MEMORY_REMOTE_SHARE: Final = 1 / 16
# Keys that were read once, and are kept when they are read again.
MEMORY_REMOTE_SIGHTED_MAX: Final = 10_000
# The largest region that is durable or kept on two nodes: each change of it is sent whole.
MEMORY_KEPT_REGION_BYTES_MAX: Final = 256 * MiB
# A store under which the disk was full is written through the map again once so much of it is free.
MEMORY_GROUND_FREE_BYTES: Final = 64 * MiB
# The disk blocks of a store are taken in steps of this, before they are used ...
MEMORY_GROUND_STEP_BYTES: Final = 8 * MiB
# ... with so much to spare for what a change needs beside its own pages: the list of the pages that it frees,
# 8 bytes for each 4 KiB, and the upper pages of the tables.
MEMORY_GROUND_SPARE_BYTES: Final = 4 * MiB
# Keys of one answer to SCAN; a client that asks for more gets them in turns.
MEMORY_SCAN_KEYS_MAX: Final = 100_000
# A line of memcached's protocol, which is a command, a key and some numbers or flags ...
MEMCACHED_LINE_BYTES_MAX: Final = 2 * KiB
# ... but a get names as many keys as its client likes: 30,000 of the longest.
MEMCACHED_GET_BYTES_MAX: Final = 8 * MiB
# Items whose last use by memcached's protocol is remembered, some 250 bytes each.
MEMCACHED_USES_MAX: Final = 65_536

# --- processors -----------------------------------------------------------------------------
# Calls waiting on one node for a worker; past it callers are told that it is busy.
CALLS_WAITING_MAX: Final = 100_000
# A call's own time limit: a month is no limit, and more would not fit a context.
CALL_TIMEOUT_MS_MAX: Final = 31 * 24 * 3600 * 1000
# Repetitions after dead workers: more means that the call is ill.
CALL_RETRIES_MAX: Final = 1000
# Repetitions after lost nodes, not charged to those; after the loss of the client's own node, about 10 s.
CALL_NODES_LOST_MAX: Final = 100
CALL_NODE_LOST_MAX: Final = 12
# What one call may ask for. Python itself, and what a call imports, does not fit less memory.
CALL_GPUS_MAX: Final = 64
CALL_MEMORY_BYTES_MIN: Final = 16 * MiB
CALL_MEMORY_BYTES_MAX: Final = 1024 * 1024 * GiB
# Calls that wait are taken by priority, from this to its negative.
CALL_PRIORITY_MAX: Final = 1000
# Worker processes of one node, nested calls included: recursion must end before the machine.
WORKERS_MAX: Final = 256
# From SIGTERM to SIGKILL for a cancelled call.
CALL_TERMINATE_S: Final = 2.0
# Output of an allowlisted program; one that writes more is stopped, and the error says so.
PROGRAM_OUTPUT_BYTES_MAX: Final = 16 * MiB
# Labels of calls whose durations a node knows.
DURATIONS_MAX: Final = 4096
# What is kept of the output of a worker, for how many calls, of how many dead workers; what is read at once.
OUTPUT_BYTES: Final = 1 * MiB
OUTPUT_READ_BYTES: Final = 256 * KiB
# Who follows what a call writes asks so often while there is some, and less and less while there is none.
OUTPUT_LOOK_S: Final = 0.05
OUTPUT_LOOK_S_MAX: Final = 0.4
# What a call has written and who follows it has not read: beyond this it is held, and then kept so long.
OUTPUT_UNREAD_BYTES_MAX: Final = 64 * MiB
OUTPUT_UNREAD_S: Final = 600.0
OUTPUT_HOLD_LOOK_S: Final = 0.02
OUTPUT_ENTRIES_MAX: Final = 10_000
OUTPUT_FILES_MAX: Final = 64
# A template imports modules of the user's choice before its first worker: time for that.
TEMPLATE_START_S: Final = 60.0
# From the end of a worker's connection to the report of how it ended.
WORKER_STATUS_S: Final = 1.0
# Shipped functions that a worker keeps; the least recently used goes.
FUNCTIONS_CACHED_MAX: Final = 1_000
# Text of a remote exception in a message; its traceback may have 16 times that.
ERROR_TEXT_CHARS_MAX: Final = 4_000
# What workers write to stdout and stderr; the file is emptied when it has grown past this.
WORKER_LOG_BYTES_MAX: Final = 64 * MiB
# A published function that was looked up this recently is not looked up again (a signal tells earlier).
EXPORT_FRESH_S: Final = 5.0
# Results handed to a client in one reply: enough to amortise it, not enough to hold up the next.
COLLECT_CALLS_MAX: Final = 1_000
COLLECT_BYTES_MAX: Final = 4 * MiB
# Calls that a client hands in by one pipeline: the node answers other clients in between.
SUBMIT_CALLS_MAX: Final = 500
SUBMIT_BYTES_MAX: Final = 8 * MiB
# Calls in flight of one asyncio client; each has a connection of its own.
ASYNC_CALLS_MAX: Final = 64
# How long COLLECT waits before it answers with nothing ...
COLLECT_WAIT_S: Final = 20.0
# ... and how long a client may leave its results uncollected, or be away, before its calls are cancelled.
COLLECT_GRACE_S: Final = 30.0
COLLECT_GONE_S: Final = 0.5

# Buffers from this size on are put into shared memory: a smaller one is copied in the time of mapping ...
APART_BYTES_MIN: Final = 256 * KiB
# ... unless so many of them are open already, for each takes a descriptor.
APART_SEGMENTS_MAX: Final = 256
# Of shared memory that is not used any more a process keeps so many pieces for what it sends next, since to
# have the kernel make pages takes longer than to fill them ...
APART_SPARE_MAX: Final = 3
# ... of so many bytes together, for so long as it is at work.
APART_SPARE_BYTES_MAX: Final = 512 * MiB
# Large buffers go to other machines in such pieces, some at once; results are kept while somebody takes any.
FREIGHT_PIECE_BYTES: Final = 1 * MiB
FREIGHT_AT_ONCE: Final = 4
FREIGHT_KEPT_S: Final = 30.0
# Outcomes that a leased worker lays down before it sends them, for its client to see whatever happens ...
LEASE_OUTCOMES_BYTES: Final = 64 * KiB
# ... and how long it keeps them back for others to go along.
LEASE_OUTCOMES_S: Final = 0.0002
# Work that is sent ahead to a leased worker: enough for it never to wait for its client, whose threads take
# turns of 5 ms ...
LEASE_AHEAD_S: Final = 0.01
# ... and no more calls than this, ...
LEASE_AHEAD_CALLS_MAX: Final = 4_000
# ... nor bytes, unless it is one call.
LEASE_AHEAD_BYTES_MAX: Final = 256 * KiB
# A call not heard of for so long, and some times what it usually takes, is slow: the rest is taken back.
LEASE_SLOW_S: Final = 0.01
# Workers that one client leases at once.
LEASES_MAX: Final = 64
# A leased worker that has done nothing for so long may be had by others who wait ...
LEASE_IDLE_S: Final = 0.002
# ... one at work is, after so long, if nobody else's turn is over before; ...
LEASE_TURN_S: Final = 0.1
# ... and without anybody waiting it goes back after this.
LEASE_UNUSED_S: Final = 10.0
# How often a node looks whether a lease may be had for those who wait.
LEASE_LOOK_S: Final = 0.005
# After a client has gone, its workers may finish what takes no longer than this.
LEASE_LEAVE_S: Final = 0.1
# Ends of leases that are kept for clients who ask how their worker ended.
LEASE_ENDS_MAX: Final = 1_000
# Before it asks for more workers, a client has work for those that it has for at least this long.
LEASE_WORTH_S: Final = 0.0005
# Calls that take less than this stay on the machine: to send one to another costs as much.
LEASE_AWAY_S: Final = 0.002

# --- files ----------------------------------------------------------------------------------
# One read or write; larger ones are split by the client.
FILE_IO_BYTES_MAX: Final = 64 * MiB
# Descriptors of one node, persisted in its table.
DESCRIPTORS_MAX: Final = 100_000
# Of these, how many are open in the kernel at once; the rest are reopened on use.
DESCRIPTORS_LIVE_MAX: Final = 512
# A descriptor that nobody has used for a day belongs to a client that has vanished: few programs are idle for
# longer and still expect their files open, and those are told.
DESCRIPTOR_IDLE_S: Final = 24 * 3600.0
# When all are taken, the least recently used makes room: any program that works uses its files this often.
DESCRIPTOR_IDLE_FULL_S: Final = 600.0
# They are looked for this often.
DESCRIPTOR_SWEEP_S: Final = 60.0
# Expired ones whose next user is told so; later ones get "no file is open".
DESCRIPTORS_EXPIRED_MAX: Final = 10_000
PATH_BYTES_MAX: Final = 4096
# Entries of one directory listing.
LISTING_ENTRIES_MAX: Final = 1_000_000
# The kernel's bound on one name in a path (NAME_MAX of every Linux file system).
FILE_NAME_BYTES_MAX: Final = 255
# A placed path is kept in the name of a register (512 bytes), behind its prefix.
PLACED_PATH_BYTES_MAX: Final = 480
# Cached reads up to this size are answered by the event loop itself: a copy of about 100 us.
FILE_CACHED_READ_BYTES_MAX: Final = 1 * MiB
# The piece in which clients move whole files: large for the disk, small beside other requests.
FILE_CHUNK_BYTES: Final = 4 * MiB
# Pieces that a client has on the way at once.
FILE_CHUNKS_AHEAD: Final = 4
# Parts of files that are read at once by who wants many.
FILE_RANGES_AT_ONCE: Final = 8
# Buffer of a file object: one trip to a remote node per MiB.
FILE_BUFFER_BYTES: Final = 1 * MiB
# Threads of one node that wait for disks.
FILE_THREADS_MAX: Final = 8
# Entries of a directory that one act gives: what the kernel has room for.
FILE_ACT_ENTRIES_BYTES_MAX: Final = 64 * KiB
# Serials set aside per fsync, so that a descriptor is never given twice, even after power loss.
DESCRIPTOR_SERIALS_RESERVED: Final = 65_536
# Lines of the descriptor table beyond its entries before it is written anew.
DESCRIPTOR_LINES_SPARE_MAX: Final = 20_000
# Times that a placed path is looked up again when it moves under the request.
PLACEMENT_ATTEMPTS_MAX: Final = 8

# --- engine ---------------------------------------------------------------------------------
# The engine's own bound on one message, with room for headers.
LOG_ENTRY_BYTES_MAX: Final = 1 * MiB - 8 * KiB
REGISTER_BYTES_MAX: Final = LOG_ENTRY_BYTES_MAX
# Entries of one append: the engine's bound on a batch, and 10 bits of an entry's sequence count them.
LOG_BATCH_ENTRIES_MAX: Final = 1_000
# Answer expected from the engine; an election takes up to 9 s.
ENGINE_REQUEST_S: Final = 10.0
# Names of logs, registers, leases and signals; encoded, three times as long, they fit the engine's line.
ENGINE_NAME_BYTES_MAX: Final = 512
# All entries of one append together: the engine stages and syncs them within ENGINE_REQUEST_S.
LOG_BATCH_BYTES_MAX: Final = 64 * MiB
# Messages of one subscription that wait for its handler; past it the newest are dropped, and it is said.
ENGINE_PENDING_BYTES_MAX: Final = 128 * MiB
# Requests that one server of a signal works on at once; further ones wait their turn.
SIGNAL_REQUESTS_MAX: Final = 256
# From its start until the embedded engine serves: it reads its whole store first.
ENGINE_START_S: Final = 60.0
# How often the embedded engine is looked at, whether it can write ...
ENGINE_CHECK_S: Final = 5.0
# ... and how many looks in a row must fail before it is started anew: one may fall into a hard time of the
# machine's; each waits ENGINE_REQUEST_S before it fails.
ENGINE_CHECKS_FAILED_MAX: Final = 2
# What the disk must take before an engine that cannot write is started anew: one message of the largest size.
# On a full disk that would change nothing, and meanwhile it still answers reads.
ENGINE_ROOM_BYTES: Final = 1 * MiB
# Nothing is started on a disk with less room: engine, node and logs would fail at different places.
START_ROOM_BYTES: Final = 1 * MiB
# Share of the free disk that the embedded engine may fill.
ENGINE_DISK_SHARE: Final = 0.75
# One answer of the engine's monitoring port.
ENGINE_MONITOR_BYTES_MAX: Final = 16 * MiB
LEASE_TTL_S_MIN: Final = 3.0
# The engine takes whole seconds in 32 bits; a lease of more than a day is a register.
LEASE_TTL_S_MAX: Final = 86_400.0
# A holder counts its lease as lost this much earlier than the server: for clocks that do not run alike.
LEASE_MARGIN_S: Final = 0.1

# --- node -----------------------------------------------------------------------------------
# Time for a node to serve after its process starts.
NODE_START_S: Final = 30.0
# Time for a node to finish what it has in hand after SIGTERM.
NODE_STOP_S: Final = 5.0
# A process that dies again and again is restarted ever more slowly, up to this.
RESTART_BACKOFF_S_MAX: Final = 30.0
# A clock that is ahead by more than this is refused, lest one bad clock drag all along.
CLOCK_SKEW_MS_MAX: Final = 60_000
# A process that SIGKILL has not ended in this time hangs in the kernel; say so instead of waiting.
PROCESS_KILL_S: Final = 10.0
# The service manager restarts a node that has been silent for so long; a slow one is not shot.
WATCHDOG_S: Final = 30.0

# --- the mount ------------------------------------------------------------------------------
# The most that the kernel reads or writes at once: 256 pages, which is what it grants by default.
FUSE_IO_BYTES_MAX: Final = 1 * MiB
# Reads ahead and other requests that nobody waits for, at once.
FUSE_BACKGROUND_MAX: Final = 64
# File systems upon each other, the mount among them: what is passed through may lie on an overlay.
FUSE_STACKED_MAX: Final = 2
# Processes that answer the kernel: more do not help two programs, and each takes 30 MB.
MOUNT_WORKERS_MAX: Final = 4
# Threads of each: one that waits for another machine holds up no other.
MOUNT_THREADS: Final = 8
# Without notices of changes, what the kernel was told of a file is true for so long.
MOUNT_VALID_S: Final = 1.0
# Directories that a process has at hand, open.
MOUNT_DIRECTORIES_MAX: Final = 1024
# Descriptors for files that were closed meanwhile are let go this often, or when there are so many.
MOUNT_SWEEP_S: Final = 1.0
MOUNT_OPEN_SPARE_MAX: Final = 256
# The table of what the kernel knows: 300 bytes a file, so ten million of them. Memory is taken as it fills.
MOUNT_TABLE_BYTES_MAX: Final = 4 * GiB
# After the start of its processes a mount must answer in this time.
MOUNT_START_S: Final = 10.0
# A worker that ends is started again, after this time if it lived for less; if all end so, the mount does.
MOUNT_WORKER_LIFE_S: Final = 1.0
# What a node that lives may take for one act: its disk may be slow, and who asked can be killed meanwhile.
MOUNT_ACT_S: Final = 60.0
# Whether a node that was silent answers again is asked with this deadline, and again after a part of it.
MOUNT_PROBE_S: Final = 1.0
# Who makes a file set-user-ID waits so long for those who write to it; the kernel tells late of a close.
MOUNT_RELEASE_S: Final = 1.0
