"""The table of limits behind ``docs/limits.md``: where each one stands in the code, and what happens beyond it.

``scripts/check_docs`` writes the values into the page. Nothing of the package is imported for them: the numbers are
read from the source, so that a page can be checked without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from lingbot_rt.config import ServeConfig, flag
from lingbot_rt.session.messages import Init

PACKAGE = Path(__file__).resolve().parents[1] / "lingbot_rt"

_WORDS = (
    *("MAX", "MIN", "LIMIT", "TIMEOUT", "GRACE", "PATIENCE", "WAITING", "PENDING", "BYTES", "THREADS", "BACKLOG"),
    *("DEPTH", "RANGE", "S", "TRIES", "PIXELS", "SIDE", "SIDES", "PARTS", "SCANS", "BLOCKS", "SHOWN", "LISTED", "KEPT"),
    *("CACHED", "PERIOD", "LENGTH", "DESCRIPTORS", "CHUNKS", "SHAPES", "PROMPTS", "EVENTS", "REDIRECTS", "BATCH"),
)
BOUND_LIKE = re.compile(rf"(?:^|_)(?:{'|'.join(_WORDS)})(?:_|$)")
"""Names of constants that are limits, unless ``NOT_LIMITS`` says why not."""

QUEUES = ("DaemonPool", "ThreadPoolExecutor", "Queue", "deque", "lru_cache")
"""Calls whose first whole number, or ``maxlen``, ``maxsize`` or ``max_workers``, is a limit."""


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

    @property
    def value(self) -> str:
        return in_words(value_of(self.source), self.unit)


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
            "session.messages:_MAX_TEXT",
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
        Limit("clients that wait in line", "--max-waiting", "", "as without the extension `queue`"),
        Limit(
            "more time while the session before is closing",
            "server.admission:LEAVING_LIMIT_S",
            "s",
            "error `session_busy`, close 1008",
        ),
        Limit("time without reading", "--send-timeout-s", "s", "the connection ends"),
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
            "time until a session comes to its replica", "deploy.ray:CLAIM_LIMIT_S", "s", "the replica is free again"
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
        Limit("message read on the event loop", "server.connection:INLINE_BYTES", "bytes", "it is read in a thread"),
        Limit("large messages read at a time", "server.connection:ThreadPoolExecutor", "", "the others wait"),
        Limit("inits per connection that wait", "server.connection:Queue", "", "error `invalid_init`"),
        Limit("batches encoded at a time", "server.app:ENCODER_THREADS", "", "the others wait"),
        Limit("pictures per message", "session.settings:ENCODED_FRAMES_PER_BATCH", "", "more messages are sent"),
        Limit("raw frames per message", "session.settings:RAW_FRAMES_PER_BATCH", "", "more messages are sent"),
        Limit(
            "payload inside its header", "session.messages:INLINE_PAYLOAD_LIMIT", "bytes", "it is a message of its own"
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
            "compiling for a new size",
            "--session-warmup-limit-s",
            "s",
            "error `capacity` when the compilation in work ends; one that does not end counts as a hang",
        ),
        Limit("compiled shapes per function", "models.dit:COMPILED_SHAPES", "", "further shapes run uncompiled"),
        Limit("pairs interpolated at once", "postprocess.interpolate:_PAIRS_AT_ONCE", "", "the others follow"),
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
    "deploy.ray:HEALTH_PERIOD_S": "between two looks at a replica",
    "deploy.ray:POLL_S": "between two looks at a session",
    "deploy.relay:TELL_AFTER_S": "a client that waits no longer hears of no line",
    "engine.warmup:_GUIDED_CHUNKS": "of the warm-up",
    "models.file_checks:_LISTED": "files named in an error",
    "models.file_checks:_SHOWN": "characters of a file named in an error",
    "parallel.groups:_COMMAND_BYTES": "what is longer takes a second broadcast",
    "parallel.groups:_LENGTH_BYTES": "a form",
    "postprocess.loader:_LISTED_KEYS": "names in an error",
    "server.admission:LOOK_AGAIN_S": "between two looks at the slot",
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
    "session.messages:_MAX_UINT32": "listed as init.max_chunks",
    "shapes:FOCAL_PIXELS": "of the camera",
    "transport.pacing:_SHORTEST_WAIT_S": "between two looks at a stream",
    "--port": "a number, not an amount",
    "--ulysses-degree": "must equal --num-gpus",
}
"""Names that look like limits and are none, each with the reason."""


def table(section: str) -> str:
    """The rows of a section in Markdown. Raises ValueError when there is no such section."""
    if section not in LIMITS:
        raise ValueError(f"there is no section of limits {section!r}")
    rows = [f"| {limit.what} | {limit.value} | {limit.shown_source} | {limit.beyond} |" for limit in LIMITS[section]]
    return "\n".join(["| limit | value | set by | beyond it |", "|---|---|---|---|", *rows]) + "\n"


def listed() -> set[str]:
    """The sources of all rows."""
    return {limit.source for rows in LIMITS.values() for limit in rows}


def value_of(source: str) -> Any:
    """The number behind a row's source, its default for a flag, its range for a field of an init."""
    if source.startswith("--"):
        (field,) = (field for field in dataclasses.fields(ServeConfig) if flag(field.name) == source)
        low, high = field.metadata["low"], field.metadata["high"]
        return {"default": field.default, "from": low, "to": high}
    if source.startswith("init."):
        return _range_of(source.removeprefix("init."))
    module, _, name = source.partition(":")
    found = constants(module) | queues(module)
    if name not in found:
        raise ValueError(f"{source} is not in the code")
    return found[name]


def _range_of(name: str) -> dict[str, Any]:
    (field,) = (field for field in msgspec.structs.fields(Init) if field.name == name)
    hint = field.type
    while not hasattr(hint, "__metadata__"):
        hint = hint.__args__[0]  # of ``X | None``
    meta = hint.__metadata__[0]
    return {"from": meta.ge, "to": meta.le if meta.max_length is None else meta.max_length}


def in_words(value: Any, unit: str) -> str:
    """``1048576, "bytes"`` -> ``1 MiB``."""
    if isinstance(value, dict) and "to" in value:
        high = in_words(value["to"], "")
        span = high if value["from"] is None else f"{in_words(value['from'], '')} to {high}"
        if "default" not in value:
            return f"{span} {unit}".strip()
        default = "not set" if value["default"] is None else in_words(value["default"], unit)
        return f"{default} ({span})"
    if isinstance(value, dict):
        return f"{', '.join(f'{name} {number:,}' for name, number in value.items())} {unit}"
    if isinstance(value, tuple):
        return " to ".join(in_words(part, unit) for part in value)
    if unit == "bytes":
        for size, name in ((2**20, "MiB"), (2**10, "KiB"), (10**6, "MB")):
            if value % size == 0:
                return f"{value // size} {name}"
    if value >= 2**32 - 1:
        exponent = value.bit_length() - (value & (value - 1) == 0)
        return f"2^{exponent}{'' if value == 2**exponent else ' - 1'} {unit}".strip()
    number = f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return f"{number} {unit}".strip()


def bound_like() -> set[str]:
    """Every constant, queue and flag of the package that looks like a limit."""
    found = {flag(field.name) for field in dataclasses.fields(ServeConfig) if field.metadata["high"] is not None}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.startswith(("bench.", "regression.")):  # commands of a developer
            continue
        found |= {f"{module}:{name}" for name in constants(module) if BOUND_LIKE.search(name)}
        found |= {f"{module}:{name}" for name in _named_queues(module)}
        found |= {f"{module}:{name}" for name in queues(module)}
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))


@cache
def constants(module: str) -> dict[str, Any]:
    """Name -> value of the module's constants that are numbers, pairs or tables of numbers."""
    known: dict[str, Any] = {}
    for node in _tree(module).body:
        match node:
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = value.elts if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [value]
                for name, part in zip(names, values, strict=False):
                    number = _number(part, known)
                    if isinstance(name, ast.Name) and number is not None:
                        known[name.id] = number
    return known


def _number(node: ast.expr, known: dict[str, Any]) -> Any:
    """The value of arithmetic with numbers and earlier constants; None for anything else."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return node.value
        case ast.Name(id=name):
            return known.get(name)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _number(left, known), _number(right, known)
            signs = {ast.Mult: "__mul__", ast.Pow: "__pow__", ast.Add: "__add__", ast.Sub: "__sub__"}
            return None if type(op) not in signs or None in (a, b) else getattr(a, signs[type(op)])(b)
        case ast.Tuple(elts=elements) if elements and all(_number(part, known) is not None for part in elements):
            return tuple(_number(part, known) for part in elements)
        case ast.Dict(keys=keys, values=values) if keys and all(isinstance(key, ast.Constant) for key in keys):
            numbers = [_number(value, known) for value in values]
            return (
                None
                if None in numbers
                else {ast.literal_eval(key): n for key, n in zip(keys, numbers, strict=True) if key}
            )
        case ast.Call(func=func):
            return _size(node) if ast.unparse(func) in QUEUES else None
    return None


@cache
def queues(module: str) -> dict[str, int]:
    """Kind -> size of the module's queues, pools and caches that are no constant of their own."""
    named = {id(call) for call in _named_queues(module).values()}
    found: dict[str, int] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and id(node) not in named:
            kind = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            size = _size(node)
            if kind in QUEUES and size is not None:
                found.setdefault(kind, size)
    return found


def _named_queues(module: str) -> dict[str, ast.Call]:
    """The queues, pools and caches that are constants of the module, by name."""
    return {
        node.targets[0].id: node.value
        for node in _tree(module).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in QUEUES
        and _size(node.value) is not None
    }


def _size(call: ast.Call) -> int | None:
    """The whole number in a call that sizes a queue."""
    given = [*call.args, *(word.value for word in call.keywords)]
    return next((part.value for part in given if isinstance(part, ast.Constant) and type(part.value) is int), None)
