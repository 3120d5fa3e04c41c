"""``lingbot-rt client``: runs one session on a server, measures it and saves its frames."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lingbot_rt.client.kept import RESUME_FIELDS
from lingbot_rt.commands.kept_world import (
    KeptWorld,
    add_resume_option,
    add_save_option,
    events_of,
    kept_world,
    prompts_of,
)
from lingbot_rt.commands.options import (
    add_client_options,
    api_key_from,
    require_existing,
    require_no_frames,
    require_session_size,
    whole_number,
)
from lingbot_rt.commands.output import say
from lingbot_rt.commands.session_options import (
    DEFAULT_KEYS,
    add_session_options,
    checked_init,
    chunks_for,
    first_frame_bytes,
    init_fields,
    parse_keys,
    require_poses_options,
    script_of,
)
from lingbot_rt.errors import ConfigError
from lingbot_rt.session.controls import Actions
from lingbot_rt.shapes import latent_frame_of_pixel_frame, latent_frames_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_client_options(parser)
    add_session_options(parser)
    parser.add_argument("--quality", type=whole_number(1, 100), metavar="N", help="webp or jpeg quality, 1 to 100")
    parser.add_argument(
        "--live",
        action="store_true",
        help="press --keys during the session, as a person would, and measure key-to-frame latency "
        "(default: send them as one script in the init)",
    )
    add_resume_option(parser)
    add_save_option(parser)


def run(args: argparse.Namespace) -> int:
    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    require_no_frames("--out", args.out, overwrite=args.overwrite)
    require_poses_options(args)
    if args.live and args.poses is not None:
        raise ConfigError("--live: expected --keys with it, not --poses", field="live")
    world = kept_world("--resume", args.resume, args)
    walk = _new_world(args) if world is None else _kept_world(args, world)
    saved_at = _walk(args, walk)
    if saved_at is not None:
        say(f"{args.save}: the world before chunk {saved_at}")
    return 0


@dataclass(frozen=True, slots=True)
class _Plan:
    """One walk on a server."""

    init: dict[str, Any]  # arguments of ``connect``
    actions: Actions  # pressed during the walk
    events: Sequence[tuple[str, Any]]  # sent before it: kind and payload
    chunks: int | None  # None: without end
    frames: int | None  # of them all
    fps: float  # of the frames as they come


def _new_world(args: argparse.Namespace) -> _Plan:
    from lingbot_rt.commands.walk import frames_of_walk

    actions: Actions = parse_keys(args.keys or DEFAULT_KEYS) if args.live else ()
    conditions, moves = ({"camera_actions": [[]]}, actions) if args.live else script_of(args)
    options = {
        "prompt": args.prompt,
        "first_frame": first_frame_bytes(args.first_frame),
        "size": None if args.size is None else str(args.size),
        "fps": args.fps,
        "num_frames": args.num_frames,
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "max_chunks": chunks_for(moves, latent_frames_for(args.num_frames), args.chunks),
        "realtime_output_format": args.format,
        "output_compression": args.quality,
        "condition_inputs": conditions,
    }
    fields, init = checked_init(options, init_fields(args.init))
    rate = 2**init.frame_interpolation_exp if init.enable_frame_interpolation else 1
    chunks, latent_frames = init.max_chunks, latent_frames_for(init.num_frames)
    frames = None if chunks is None else frames_of_walk(chunks, latent_frames, rate)
    return _Plan(fields, actions, (), chunks, frames, init.fps * rate)


def _kept_world(args: argparse.Namespace, world: KeptWorld) -> _Plan:
    extra = init_fields(args.init)
    for name in extra:
        if name not in RESUME_FIELDS:
            raise ConfigError(f"--init {name}: expected none beside --resume: a kept world has its own", field="init")
    actions: Actions = parse_keys(args.keys or DEFAULT_KEYS) if args.live else ()
    events, moves = (prompts_of(args), actions) if args.live else events_of(args)
    chunks = chunks_for(moves, world.latent_frames, args.chunks)
    fields = {
        "resume": world.resume,
        "realtime_output_format": args.format,
        "output_compression": args.quality,
        "max_chunks": chunks,
    } | extra
    return _Plan(fields, actions, events, chunks, world.frames(chunks), world.fps)


def _walk(args: argparse.Namespace, plan: _Plan) -> int | None:
    """Returns the chunk that comes next in the saved world, if one is saved."""
    from lingbot_rt.client import connect
    from lingbot_rt.commands.walk import Walk

    init = plan.init
    if args.save is not None:
        if plan.chunks is None:
            raise ConfigError("--save: expected a walk with an end, and max_chunks with it", field="save")
        init = init | {"max_chunks": None}  # the world is saved in the last chunk, so the session goes on after it
    saved_at: int | None = None
    with (
        Walk(args.out, plan.fps, overwrite=args.overwrite) as walk,
        connect(args.url, api_key=api_key_from(args), script=None, **init) as session,
    ):
        walk.begin(plan.frames, session.stats)
        for kind, payload in plan.events:
            session.send_event(kind, payload)
        held: tuple[str, ...] = ()
        last: int | None = None
        for frame in session:
            if last is None and plan.chunks is not None:
                last = frame.chunk_index + plan.chunks - 1
            if saved_at is not None and frame.chunk_index >= saved_at:
                break
            walk.add(frame.pixels, frame.chunk_index, frame.event_id)
            if args.save is not None and saved_at is None and frame.chunk_index == last:
                saved_at = session.save(args.save)
            if args.live:
                wanted = keys_at(plan.actions, frame.index)
                if wanted != held:
                    held = wanted
                    walk.metrics.event_sent(session.hold(*held))
    return saved_at


def keys_at(actions: Actions, frame_index: int) -> tuple[str, ...]:
    """The keys held while pixel frame ``frame_index`` is shown: none after the end of ``actions``."""
    latent = latent_frame_of_pixel_frame(frame_index)
    return actions[latent] if latent < len(actions) else ()
