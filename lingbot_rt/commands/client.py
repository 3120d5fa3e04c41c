"""``lingbot-rt client``: runs one session on a server, measures it and saves its frames."""

from __future__ import annotations

import argparse

from lingbot_rt.commands.options import (
    add_client_options,
    api_key_from,
    require_existing,
    require_no_frames,
    require_session_size,
    whole_number,
)
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


def run(args: argparse.Namespace) -> int:
    from lingbot_rt.client import connect
    from lingbot_rt.commands.walk import Walk, frames_of_walk

    require_session_size(args.size)
    require_existing("--first-frame", args.first_frame)
    require_no_frames("--out", args.out, overwrite=args.overwrite)
    require_poses_options(args)
    if args.live and args.poses is not None:
        raise ConfigError("--live: expected --keys with it, not --poses", field="live")
    actions: Actions = parse_keys(args.keys or DEFAULT_KEYS) if args.live else ()
    conditions, moves = ({"camera_actions": [[]]}, actions) if args.live else script_of(args)
    api_key = api_key_from(args)
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

    with (
        Walk(args.out, init.fps * rate, overwrite=args.overwrite) as walk,
        connect(args.url, api_key=api_key, script=None, **fields) as session,
    ):
        walk.begin(None if chunks is None else frames_of_walk(chunks, latent_frames, rate), session.stats)
        held: tuple[str, ...] = ()
        for frame in session:
            walk.add(frame.pixels, frame.chunk_index, frame.event_id)
            if args.live:
                wanted = keys_at(actions, frame.index)
                if wanted != held:
                    held = wanted
                    walk.metrics.event_sent(session.hold(*held))
    return 0


def keys_at(actions: Actions, frame_index: int) -> tuple[str, ...]:
    """The keys held while pixel frame ``frame_index`` is shown: none after the end of ``actions``."""
    latent = latent_frame_of_pixel_frame(frame_index)
    return actions[latent] if latent < len(actions) else ()
