"""The options of each kind of ``lingbot-rt bench``."""

from __future__ import annotations

import argparse

from lingbot_rt.commands.options import (
    add_client_options,
    add_options_named,
    add_size_option,
    non_negative_int,
    output_file,
    path_text,
    positive_float,
    positive_int,
    real_number,
    rising_ints,
    whole_number,
)
from lingbot_rt.session.messages import FPS_RANGE, STEPS_RANGE
from lingbot_rt.shapes import FrameSize

DEVICE_OPTIONS = (
    "schedule",
    "device",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "vae_dtype",
    "compile",
    "compile_cache",
    "dit_cpu_offload",
    "attention_backend",
    "vae_parallel",
    "peer_memory",
    "cuda_graphs",
)
"""The options of ``serve`` that change the pipeline's steps or speed."""

VARIED_OPTIONS = ("quantization", "kv_cache_dtype", "vae_dtype")
"""Those that the cases of ``targets`` and the variants of ``fidelity`` set themselves."""


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_steps(parser)
    parser.add_argument(
        "--random-weights", action="store_true", help="use the model's shapes with random weights; reads no weight file"
    )
    parser.add_argument(
        "--num-gpus",
        dest="ranks",
        type=rising_ints,
        default=(1,),
        metavar="N[,N...]",
        help="GPUs that share each session; several numbers, such as 1,2,4, are measured in turn and compared "
        "(default: 1)",
    )
    _add_window(parser)
    _add_chunks(parser, 20, "chunks to measure")
    parser.add_argument(
        "--warm",
        type=non_negative_int,
        metavar="N",
        help="warm-up chunks (default: one more than fill the window, at least 6)",
    )
    parser.add_argument(
        "--case",
        choices=("sglang-ci",),
        metavar="sglang-ci",
        help="sglang-ci: measure chunks 0 to 3 of --chunks / 4 sessions, with window 18 and sink 9",
    )
    parser.add_argument(
        "--interactive-kv-window",
        dest="windows",  # the option of that name is a server's
        action="store_true",
        help="compare the whole window with the interactive one, chunk by chunk in turn; --chunks is for each",
    )
    add_options_named(parser, DEVICE_OPTIONS)
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw a bar chart of the stages")
    parser.add_argument(
        "--profile", type=output_file, metavar="FILE.json", help="write a Chrome trace of one chunk after measuring"
    )


def add_collectives_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_steps(parser)
    add_options_named(parser, ("device", "dtype", "kv_cache_dtype"))
    parser.add_argument(
        "--num-gpus",
        dest="ranks",
        type=positive_int,
        default=2,
        metavar="N",
        help="GPUs that exchange data (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=20,
        metavar="N",
        help="calls per round; there are five rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk-ms", type=positive_float, metavar="MS", help="chunk time from `bench pipeline`, to print shares of it"
    )


def add_targets_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_window(parser)
    _add_chunks(parser, 10, "chunks to measure per case")
    parser.add_argument(
        "--far",
        type=positive_int,
        default=2000,
        metavar="N",
        help="chunk index that is compared with the first chunks of a full window (default: %(default)s)",
    )
    _add_options_of_cases(parser)


def add_fidelity_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_steps(parser)
    _add_window(parser)
    _add_chunks(parser, 12, "chunks of each session")
    parser.add_argument(
        "--frames-model",
        type=path_text,
        default="builtin",
        metavar="TEXT",
        help="model with weights whose frames are compared: builtin, a diffusers folder, or a hub id (default: "
        "%(default)s)",
    )
    _add_options_of_cases(parser)


def add_transport_options(parser: argparse.ArgumentParser) -> None:
    add_size_option(parser, default=FrameSize(832, 480))
    parser.add_argument(
        "--frames", type=positive_int, default=96, metavar="N", help="frames to measure (default: %(default)s)"
    )


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    from lingbot_rt.commands.session_options import add_first_frame_option

    add_client_options(parser)
    add_size_option(parser)
    add_first_frame_option(parser)
    _add_chunks(parser, 30, "chunks of the session")
    parser.add_argument(
        "--fps", type=real_number(*FPS_RANGE), default=16.0, metavar="N", help="frame rate of the session (default: 16)"
    )
    parser.add_argument(
        "--press-every",
        type=positive_float,
        default=0.7,
        metavar="S",
        help="mean seconds between key changes (default: 0.7)",
    )
    parser.add_argument(
        "--playback-fps",
        type=positive_float,
        metavar="N",
        help="frame rate of the simulated video player that counts underruns (default: --fps)",
    )
    parser.add_argument(
        "--playback-lead",
        type=positive_float,
        default=0.5,
        metavar="S",
        help="seconds that this player buffers before it starts (default: 0.5)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=path_text,
        default="lingbot-world-fast",
        metavar="TEXT",
        help="lingbot-world-fast or lingbot-world-v2 (shapes of the published 14B), builtin, a diffusers folder, or a "
        "hub id (default: %(default)s)",
    )
    add_size_option(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=whole_number(*STEPS_RANGE), metavar="N", help="denoise steps per chunk (default: the model's)"
    )


def _add_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window", type=positive_int, metavar="N", help="latent frames in the window (default: the model's; 14B: 18)"
    )
    parser.add_argument(
        "--sink",
        type=non_negative_int,
        metavar="N",
        help="latent frames of the window kept from the session's start (default: the model's; 14B: 9)",
    )


def _add_options_of_cases(parser: argparse.ArgumentParser) -> None:
    excluded = (*VARIED_OPTIONS, "vae_parallel", "peer_memory")  # which need several GPUs
    add_options_named(parser, [name for name in DEVICE_OPTIONS if name not in excluded])


def _add_chunks(parser: argparse.ArgumentParser, default: int, meaning: str) -> None:
    parser.add_argument(
        "--chunks", type=positive_int, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
    )
