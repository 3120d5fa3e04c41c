"""The rows of ``docs/limits.md``: where each limit stands in the code, and what happens beyond it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """One row. ``source``: ``module:NAME`` below lingbot_rt, ``--flag`` or ``init.field``."""

    what: str
    source: str
    unit: str
    beyond: str

    @property
    def shown_source(self) -> str:
        return f"`{self.source}`" if self.source.startswith("--") else f"`{self.source.replace(':', '.')}`"


LIMITS: dict[str, tuple[Limit, ...]] = {
    "messages": (
        Limit("any message", "--max-message-mb", "MiB", "error `message_too_large`, close 1009"),
        Limit("an event", "session.messages:MAX_EVENT_BYTES", "bytes", "error `invalid_event`; the session goes on"),
        Limit("values in an init", "session.messages:MAX_INIT_VALUES", "", "error `invalid_init`"),
        Limit("values in an event", "session.messages:MAX_EVENT_VALUES", "", "error `invalid_event`"),
        Limit("nesting of lists and maps", "session.message_reader:MAX_DEPTH", "", "error by kind of message"),
        Limit("a prompt", "session.messages:MAX_PROMPT_CHARACTERS", "characters", "error by kind of message"),
        Limit("frames per chunk", "init.num_frames", "", "error `invalid_init`"),
        Limit("denoise steps", "init.num_inference_steps", "", "error `invalid_init`"),
        Limit("frame rate", "init.fps", "", "error `invalid_init`"),
        Limit("sink", "init.realtime_causal_sink_size", "latent frames", "error `invalid_init`"),
        Limit("window", "init.realtime_causal_kv_cache_num_frames", "latent frames", "error `invalid_init`"),
        Limit("chunks of a session", "init.max_chunks", "", "error `invalid_init`"),
        Limit("pinned events", "init.pinned_events", "", "error `invalid_init`"),
        Limit("an event id", "session.messages:_MAX_EVENT_ID", "", "error by kind of message"),
        Limit(
            "a script or a path of poses", "session.controls:MAX_PENDING", "latent frames", "error by kind of message"
        ),
        Limit("numbers of poses and intrinsics", "session.camera_poses:MAX_COORDINATE", "", "error by kind of message"),
        Limit("step between two poses", "session.camera_poses:MAX_STEP", "world units", "error by kind of message"),
        Limit("width x height", "--max-pixels", "pixels", "error `invalid_init` with the nearest valid size"),
        Limit("width and height, least", "session.settings:MIN_SIDE", "pixels", "error `invalid_init`"),
        Limit(
            "width and height of pictures sent",
            "session.settings:MAX_PICTURE_SIDE",
            "pixels",
            "error `invalid_init` before the session opens",
        ),
        Limit(
            "text of an error",
            "session.server_messages:_MAX_TEXT",
            "characters",
            "the text is cut",
        ),
        Limit("value shown in an error", "session.shown:MAX_SHOWN", "characters", "the value is cut"),
        Limit("items shown of a list", "session.shown:_MAX_ITEMS_SHOWN", "", "the others are left out"),
        Limit("value shown of an option", "errors:MAX_QUOTED", "characters", "the value is cut"),
    ),
    "pictures": (
        Limit("pixels", "server.pictures.files:MAX_DECODED_PIXELS", "pixels", "error `invalid_init`"),
        Limit("width and height", "server.pictures.files:MAX_SIDE", "pixels", "error `invalid_init`"),
        Limit("pixels of JPEG 2000", "server.pictures.files:MAX_JPEG2000_PIXELS", "pixels", "error `invalid_init`"),
        Limit(
            "pixels of QOI, run-length encoded BMP and PPM as text",
            "server.pictures.files:MAX_SLOW_PIXELS",
            "pixels",
            "error `invalid_init`",
        ),
        Limit("pixels of a TIFF's tile", "server.pictures.files:MAX_TILE_PIXELS", "pixels", "error `invalid_init`"),
        Limit("scans of a progressive JPEG", "server.pictures.files:MAX_SCANS", "", "error `invalid_init`"),
        Limit("chunks, segments or entries", "server.pictures.files:MAX_PARTS", "", "error `invalid_init`"),
        Limit("blocks before a GIF's frame", "server.pictures.files:MAX_GIF_BLOCKS", "", "error `invalid_init`"),
        Limit("parts of an AVIF", "server.pictures.avif:_MAX_PARTS", "", "error `invalid_init`"),
        Limit("tags of a TIFF", "server.pictures.tiff:_MAX_TAGS", "", "the others are not read"),
        Limit("strips, tiles or colours of a TIFF", "server.pictures.tiff:_MAX_LONG", "", "the tag is not read"),
        Limit("values of another TIFF tag", "server.pictures.tiff:_MAX_SHORT", "", "the tag is not read"),
        Limit("samples per pixel of a TIFF", "server.pictures.tiff:_MAX_SAMPLES", "", "error `invalid_init`"),
        Limit("tags of EXIF", "server.pictures.metadata:_MAX_TAGS", "", "the others are not read"),
        Limit("XMP", "server.pictures.metadata:_MAX_XMP_BYTES", "bytes", "the rest is not read"),
        Limit("EXIF in a PNG's text", "server.pictures.metadata:_MAX_PROFILE_BYTES", "bytes", "the rest is not read"),
        Limit("bytes looked at to tell a format", "server.pictures.kinds:HEAD_BYTES", "bytes", "the rest is not read"),
        Limit("name in a path that may be base64", "server.pictures.kinds:_MAX_NAME", "characters", "taken for base64"),
        Limit(
            "pixels of a picture that waits for no other",
            "server.pictures.files:LARGE_PIXELS",
            "pixels",
            "decoded one at a time, and reduced meanwhile",
        ),
        Limit(
            "sides of a reduced picture",
            "server.first_frame:_REDUCED_SIDES",
            "times the session's",
            "they are not reduced further",
        ),
        Limit("ordinary pictures decoded at a time", "server.first_frame:_ORDINARY", "", "the others wait"),
        Limit("large pictures decoded at a time", "server.first_frame:_LARGE", "", "the others wait"),
        Limit("`data:` URLs read at a time", "server.pictures.source:_DATA_URLS", "", "the others wait"),
        Limit("file of `--first-frame-dir`", "server.pictures.source:MAX_FILE_BYTES", "bytes", "error `invalid_init`"),
        Limit("path in `--first-frame-dir`", "server.pictures.source:_MAX_PATH", "characters", "error `invalid_init`"),
        Limit("files read at a time", "server.pictures.source:_FILES", "", "the others wait"),
        Limit("picture behind a URL", "server.remote_picture:MAX_BYTES", "bytes", "error `invalid_init`"),
        Limit(
            "time to fetch it, redirects included", "server.remote_picture:TIME_LIMIT_S", "s", "error `invalid_init`"
        ),
        Limit("redirects", "server.remote_picture:MAX_REDIRECTS", "", "error `invalid_init`"),
        Limit("URL", "server.remote_picture:MAX_URL_LENGTH", "characters", "error `invalid_init`"),
        Limit("URLs fetched at a time", "server.remote_picture:_FETCHES", "", "the others wait within their time"),
        Limit("names looked up at a time", "server.remote_picture:_LOOKUPS", "", "the others wait within their time"),
    ),
    "connections": (
        Limit("connections, HTTP and WebSocket", "--max-connections", "", "HTTP status 503"),
        Limit(
            "connections not accepted yet", "server.app:ACCEPT_BACKLOG", "", "the system refuses them or lets them wait"
        ),
        Limit(
            "open files kept for the server itself",
            "server.http:RESERVED_DESCRIPTORS",
            "",
            "fewer connections than `--max-connections` are served; the log says so",
        ),
        Limit(
            "time to send an HTTP request",
            "server.http:REQUEST_LIMIT_S",
            "s",
            "HTTP status 408, or the connection closes",
        ),
        Limit("time of a refused connection", "server.http:REFUSED_LIMIT_S", "s", "the connection closes"),
        Limit("time to send a valid init", "--init-timeout-s", "s", "error `invalid_init`, close 1008"),
        Limit("time to wait for the slot", "--session-wait-s", "s", "error `session_busy`, close 1008"),
        Limit("sessions at a time", "--max-sessions", "", "further clients wait in line"),
        Limit("clients that wait in line", "--max-waiting", "", "as without the extension `queue`"),
        Limit(
            "more time while the session before is closing",
            "server.admission:LEAVING_LIMIT_S",
            "s",
            "error `session_busy`, close 1008",
        ),
        Limit("time without reading", "--send-timeout-s", "s", "the connection ends"),
        Limit("history of a session", "--history-mb", "MiB", "other branches and the oldest chunks are forgotten"),
        Limit("branches of a session", "engine.history:MAX_BRANCHES", "", "error `invalid_event`; the session goes on"),
        Limit("chunks before a snapshot", "engine.world:MAX_CHUNKS", "", "error `invalid_init`"),
        Limit("length of a pause", "--pause-limit-s", "s", "error `pause_expired`, close 1008"),
        Limit(
            "time to stop sending a message that is too large",
            "server.websocket:TOO_LARGE_CLOSE_S",
            "s",
            "the connection ends",
        ),
        Limit(
            "between two log lines about the same shortage", "server.http:LOG_INTERVAL_S", "s", "it is not logged again"
        ),
    ),
    "replicas": (
        Limit("replicas", "--ray-replicas", "", "an option that is refused"),
        Limit("replicas that waiting clients bring up", "--ray-max-replicas", "", "clients wait in line"),
        Limit("time to connect to a replica", "deploy.relay:CONNECT_LIMIT_S", "s", "error `engine_failed`, close 1011"),
        Limit(
            "messages that a client in line sends ahead",
            "deploy.relay:BACKLOG_MESSAGES",
            "",
            "the others are read once it has a replica",
        ),
        Limit(
            "bytes of a replica that the kernel keeps for the front",
            "deploy.relay:RECEIVE_BYTES",
            "bytes",
            "the session waits; no frame is dropped",
        ),
        Limit("time to read the last error, and to close", "deploy.relay:FAREWELL_LIMIT_S", "s", "the connection ends"),
        Limit(
            "time to answer `/metrics` and `/v1/models`", "deploy.front:REPLY_LIMIT_S", "s", "the replica is left out"
        ),
        Limit("bytes read of such an answer", "deploy.front:MAX_REPLY_BYTES", "bytes", "the replica is left out"),
        Limit("time to tell clients of a shutdown", "deploy.front:SHUTDOWN_LIMIT_S", "s", "the connection ends"),
        Limit(
            "time until a session comes to its replica", "deploy.hold:CLAIM_LIMIT_S", "s", "the replica is free again"
        ),
        Limit("time to end a session on a replica that is to go", "deploy.ray:DRAIN_LIMIT_S", "s", "the session ends"),
        Limit("silence of a replica", "deploy.ray:FORGET_AFTER_S", "s", "metrics leave it out"),
    ),
    "queues": (
        Limit(
            "unsent bytes in the kernel, and again in the process",
            "server.websocket:UNSENT_BYTES",
            "bytes",
            "the session waits; no frame is dropped",
        ),
        Limit(
            "headers parsed per turn", "server.websocket:READ_BYTES", "bytes", "the rest waits for other connections"
        ),
        Limit(
            "payload parsed per turn",
            "server.websocket:READ_PAYLOAD_BYTES",
            "bytes",
            "the rest waits for other connections",
        ),
        Limit("fragment of a long frame", "server.frame_pieces:PIECE_BYTES", "bytes", "it is cut into more fragments"),
        Limit("message read on the event loop", "server.service:INLINE_BYTES", "bytes", "it is read in a thread"),
        Limit("large messages read at a time", "server.service:ThreadPoolExecutor", "", "the others wait"),
        Limit("inits per connection that wait", "server.serving:Queue", "", "error `invalid_init`"),
        Limit("batches encoded at a time", "server.app:ENCODER_THREADS", "", "the others wait"),
        Limit("pictures per message", "session.settings:ENCODED_FRAMES_PER_BATCH", "", "more messages are sent"),
        Limit("raw frames per message", "session.settings:RAW_FRAMES_PER_BATCH", "", "more messages are sent"),
        Limit(
            "payload inside its header",
            "session.server_messages:INLINE_PAYLOAD_LIMIT",
            "bytes",
            "it is a message of its own",
        ),
        Limit("transitions that wait for a chunk", "session.controls:MAX_PENDING", "", "the oldest are left out"),
        Limit(
            "events that wait for a chunk",
            "session.controls:MAX_WAITING",
            "",
            "those that newer ones replaced are dropped: `control_ack` says so",
        ),
        Limit(
            "events kept per chunk for a record",
            "session.session:MAX_RECORDED_EVENTS",
            "",
            "the oldest are not recorded",
        ),
        Limit("chunks ahead of pacing after an event", "transport.pacing:EARLY_CHUNKS", "", "the next chunk waits"),
        Limit("time between two heartbeats", "session.session:HEARTBEAT_S", "s", "a heartbeat is sent"),
        Limit("jobs on the engine's thread", "engine.engine:ThreadPoolExecutor", "", "the others wait in order"),
        Limit("threads that wait for frames", "engine.frame_readback:ThreadPoolExecutor", "", "frames wait in order"),
        Limit(
            "prompts whose embeddings are kept",
            "models.text_encoder:_CACHED_PROMPTS",
            "",
            "the oldest is encoded again",
        ),
        Limit("tables of rotations kept", "models.rope:lru_cache", "", "the oldest is computed again"),
        Limit("mixing matrices of fp8 keys kept", "models.quantize:lru_cache", "", "the oldest is computed again"),
        Limit("VAEs without weights kept for memory plans", "models.vae:lru_cache", "", "the oldest is made again"),
        Limit("memory plans kept", "engine.dry_run:lru_cache", "", "the oldest is computed again"),
        Limit(
            "shapes of features kept for files", "engine.world_tensors:lru_cache", "", "the oldest is computed again"
        ),
        Limit(
            "compiling for a new size",
            "--session-warmup-limit-s",
            "s",
            "error `capacity` when the compilation in work ends; one that does not end counts as a hang",
        ),
        Limit("compiled shapes per function", "models.dit:COMPILED_SHAPES", "", "further shapes run uncompiled"),
        Limit(
            "forwards kept as CUDA graphs",
            "models.captured_forward:MOST_GRAPHS",
            "",
            "the one unused for longest is dropped, and captured again if it comes back",
        ),
        Limit(
            "device memory that must be free for another CUDA graph",
            "models.captured_forward:SPARE_BYTES",
            "B",
            "the forward is launched kernel by kernel",
        ),
        Limit(
            "forwards that the driver refuses to capture",
            "models.captured_forward:MOST_FAILURES",
            "",
            "from then on all are launched kernel by kernel",
        ),
        Limit("pairs interpolated at once", "postprocess.interpolate:_PAIRS_AT_ONCE", "", "the others follow"),
    ),
    "kept": (
        Limit("time without a client", "--resume-s", "s", "the session ends; its token is refused"),
        Limit("memory of parked sessions", "--parked-mb", "MiB", "the oldest are kept as snapshots, then they end"),
        Limit(
            "chunks between two snapshots on disk", "--snapshot-every", "", "they are lost with a server that is killed"
        ),
        Limit("chunks whose frames are sent again", "server.live_session:KEPT_CHUNKS", "", "older frames are lost"),
        Limit("these frames", "server.live_session:MAX_KEPT_FRAME_BYTES", "bytes", "only the newest chunk's are kept"),
        Limit("saved world in a message", "session.server_messages:MAX_WORLD_BYTES", "bytes", "error `invalid_event`"),
        Limit("chunks of a branch to go back to", "session.history:MAX_BOUNDARIES", "", "the oldest are forgotten"),
        Limit("events that wait, in a snapshot", "session.session_state:MAX_EVENTS", "", "error `invalid_init`"),
        Limit(
            "script or path, in a snapshot", "session.session_state:MAX_FRAMES", "latent frames", "error `invalid_init`"
        ),
        Limit("prompt, in a snapshot", "session.session_state:_MAX_PROMPT", "characters", "error `invalid_init`"),
        Limit(
            "a coordinate, in a snapshot", "session.session_state:_MAX_POSITION", "world units", "error `invalid_init`"
        ),
        Limit("header of a saved world", "session.world_file:MAX_HEADER_BYTES", "bytes", "error `invalid_init`"),
        Limit("values in it", "session.world_file:MAX_TEXT_VALUES", "", "error `invalid_init`"),
        Limit("tensors in it", "session.world_file:MAX_TENSORS", "", "error `invalid_init`"),
        Limit("time to write sessions at a stop", "server.parking:CLOSE_LIMIT_S", "s", "the others end"),
        Limit(
            "newest frames of such a session are sent",
            "server.connection:FINISH_S",
            "s",
            "they come after the next start",
        ),
        Limit("a broken socket says how it was closed", "server.serving:CLOSE_CODE_S", "s", "its line counts as lost"),
    ),
    "recording": (
        Limit("one record", "--record-max-mb", "MiB", "the record ends; the session goes on"),
        Limit("all records", "--record-total-mb", "MiB", "the oldest records are deleted"),
        Limit(
            "chunks that wait for the disk",
            "recording.session_record:_WAITING_CHUNKS",
            "",
            "the record ends; the session goes on",
        ),
        Limit("time to write the end", "recording.session_record:_CLOSE_LIMIT_S", "s", "the record has no last line"),
        Limit("chunks of one profile", "server.profiles:MAX_PROFILE_CHUNKS", "", "400"),
        Limit("wait for them", "server.profiles:PROFILE_LIMIT_S", "s", "those that came are written; 504 without any"),
        Limit("profiles kept", "server.profiles:KEPT_PROFILES", "", "the oldest are deleted"),
        Limit("chunks of a session with spans in its trace", "telemetry.tracing:MAX_CHUNK_SPANS", "", "they have none"),
        Limit("last export of spans at a shutdown", "telemetry.tracing:CLOSE_LIMIT_S", "s", "the spans are lost"),
        Limit("one export of spans", "telemetry.tracing:EXPORT_TIMEOUT_S", "s", "it is logged, and the spans are lost"),
        Limit("places named as left out", "recording.record_file:MAX_LEFT_OUT", "", "the others are not named"),
    ),
    "process": (
        Limit("time without progress", "--chunk-timeout-s", "s", "error `engine_failed`, exit code 1"),
        Limit("the same with several GPUs", "--rank-timeout-s", "s", "error `engine_failed`, exit code 1"),
        Limit("factor on it during start", "parallel.watchdog:START_PATIENCE", "", "exit code 1"),
        Limit("between two looks at the engine's thread", "engine.progress:POLL_S", "s", "it looks again"),
        Limit("between two looks at the other processes", "parallel.watchdog:PERIOD_S", "s", "it looks again"),
        Limit(
            "wait for the cause of a lost connection", "parallel.watchdog:CAUSE_GRACE_S", "s", "the loss itself is told"
        ),
        Limit("`/health` shows a failure", "server.app:FAILURE_SHOWN_S", "s", "the process ends"),
        Limit("clients are told of a shutdown", "server.app:SHUTDOWN_LIMIT_S", "s", "their connections are cut"),
        Limit(
            "a client reads its last error then", "server.connection:SHUTDOWN_FAREWELL_S", "s", "its connection is cut"
        ),
        Limit("clients answer the close then", "server.app:CLOSE_HANDSHAKE_S", "s", "their connections are cut"),
        Limit("the whole shutdown", "commands.serve:STOP_LIMIT_S", "s", "the process ends with exit code 0"),
        Limit("the same while the model loads", "commands.serve:LOADING_STOP_LIMIT_S", "s", "the process ends"),
        Limit("a lost engine's thread at the end", "engine.engine:_LOST_GRACE_S", "s", "it is left behind"),
        Limit("other processes end by themselves", "parallel.launch:STOP_GRACE_S", "s", "they are killed"),
        Limit(
            "part of it to tell the client, once a process is lost", "parallel.watchdog:_SHUTDOWN_S", "s", "exit code 1"
        ),
        Limit("GPUs", "--num-gpus", "", "exit code 2"),
        Limit("threads on the CPU", "--cpu-threads", "", "exit code 2"),
        Limit("ports tried for `--port 0`", "commands.serve:_PORT_TRIES", "", "exit code 2"),
    ),
    "client": (
        Limit("message that is read", "client.connect:_MAX_MESSAGE_BYTES", "bytes", "`SessionLost`"),
        Limit("messages that wait to be read", "client.connect:_MAX_QUEUED_MESSAGES", "", "the server waits"),
        Limit("wait for the server's close", "client.connect:_CLOSE_LIMIT_S", "s", "the connection is cut"),
        Limit("statistics kept", "client.protocol:_KEPT_STATS", "chunks", "the oldest are forgotten"),
        Limit("warnings kept", "client.protocol:_KEPT_WARNINGS", "", "the oldest are forgotten"),
        Limit("places kept where a session went on", "client.protocol:_KEPT_PLACES", "", "the oldest are forgotten"),
        Limit(
            "events without an answer, to be sent again",
            "client.kept:_KEPT_EVENTS",
            "",
            "the oldest are not sent again",
        ),
        Limit("wait for a saved world", "client.sessions:SAVE_LIMIT_S", "s", "`SaveFailed`"),
        Limit("chunks until a saved world comes", "client.protocol:_SAVE_CHUNKS", "", "`SaveFailed`"),
        Limit("answer of /v1/models", "client.server_info:_MAX_BYTES", "bytes", "the rest is not read"),
        Limit("each wait for it", "client.server_info:_TIMEOUT_S", "s", "an error that names the server"),
    ),
}
"""Section of the page -> its rows."""

NOT_LIMITS = {
    "commands.animation:_GIF_MAX_FPS": "GIF has no higher rate",
    "commands.bench_load:LONGEST_S": "of a measurement",
    "commands.bench_load:MAX_CLIENTS": "of a measurement",
    "commands.doctor:_LINE_LENGTH": "of what is printed",
    "commands.output:_MAX_CHARACTERS": "of what is printed",
    "commands.walk:_LINE_INTERVAL_S": "between two lines of progress",
    "commands.local_engine:_POLL_S": "between two looks of a command",
    "engine.warmup:_GUIDED_CHUNKS": "of the warm-up",
    "models.file_checks:_LISTED": "files named in an error",
    "models.file_checks:_SHOWN": "characters of a file named in an error",
    "parallel.groups:_COMMAND_BYTES": "what is longer takes a second broadcast",
    "parallel.groups:_LENGTH_BYTES": "a form",
    "parallel.peer_memory:SHIFT_BYTES": "a unit",
    "parallel.peer_memory:_ROUND_BYTES": "memory is taken in pieces of it",
    "postprocess.loader:_LISTED_KEYS": "names in an error",
    "server.admission:LOOK_AGAIN_S": "between two looks at the slot",
    "client.kept:_DELAYS_S": "between two tries of a client that comes back",
    "server.admission:REMINDER_S": "between two messages to a client in line",
    "server.connection:TICK_S": "between two looks at a session",
    "server.first_frame:_BAND_PIXELS": "a picture is converted in bands of it",
    "server.frame_pieces:_LENGTH": "a mask",
    "server.pictures.data_url:_BLOCK_BYTES": "a URL is decoded in blocks of it",
    "server.pictures.tiff:_STRIP_BYTES": "number of a tag",
    "server.pictures.tiff:_TILE_BYTES": "number of a tag",
    "server.pictures.tiff:_TYPE_BYTES": "a table of sizes",
    "session.camera_poses:_MIN_DETERMINANT": "of a matrix: below it no rotation is near",
    "session.camera_path:PITCH_LIMIT_DEGREES": "of the camera: steps beyond it are left out",
    "session.message_reader:_COPY_BYTES": "bytes are copied in pieces of it",
    "session.messages:FPS_RANGE": "listed as init.fps",
    "session.messages:MAX_NUM_FRAMES": "listed as init.num_frames",
    "session.messages:MAX_PINNED_EVENTS": "listed as init.pinned_events",
    "session.messages:STEPS_RANGE": "listed as init.num_inference_steps",
    "server.parking:_TOKEN_BYTES": "random bytes of a token",
    "session.history:_MAX_UINT32": "of a number on the wire",
    "session.messages:_MAX_UINT32": "listed as init.max_chunks",
    "session.server_messages:_MAX_UINT32": "of a number on the wire",
    "shapes:FOCAL_PIXELS": "of the camera",
    "transport.pacing:_SHORTEST_WAIT_S": "between two looks at a stream",
    "--port": "a number, not an amount",
    "--ulysses-degree": "must equal --num-gpus",
    "deploy.ray:HEALTH_PERIOD_S": "between two looks at a replica",
    "deploy.hold:POLL_S": "between two looks at a session",
    "deploy.relay:TELL_AFTER_S": "a client that waits no longer hears of no line",
}
"""Names that look like limits and are none, each with the reason."""
