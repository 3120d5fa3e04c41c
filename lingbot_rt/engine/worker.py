"""A follower's life: join, load, then do what rank 0 says until it says stop.

Run as ``python -m lingbot_rt.engine.worker CONFIG`` by rank 0; under torchrun ``lingbot-rt serve`` comes here itself.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from lingbot_rt.config import ServeConfig
from lingbot_rt.engine.chunk_runner import run_chunk
from lingbot_rt.engine.memory import describe_share
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import warm_up
from lingbot_rt.errors import ChunkCancelled, PeerLost
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.launch import Place, require_ranks, uses_cuda
from lingbot_rt.parallel.leader import Close, Stop
from lingbot_rt.parallel.watch import START_PATIENCE, PulseSender, first_line
from lingbot_rt.session.plan import UNCHANGED, ChunkPlan, SessionPlan

log = logging.getLogger(__name__)


def follow(config: ServeConfig, place: Place, work: Callable[[RankGroup], None]) -> int:
    """The whole process of a follower: it joins, then does ``work``; the exit code. Rank 0 hears of a failure before
    this returns."""
    # Ctrl-C reaches every process of a terminal; rank 0 tells the others when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    group = RankGroup(place.rank, place.world)
    limit_s = config.rank_timeout_s
    sender = PulseSender(place.connect(limit_s), place.rank, group.pulse, limit_s, lambda: os._exit(1))
    sender.start()
    try:
        with torch.inference_mode():
            device = place.device("cuda" if uses_cuda(config) else "cpu")
            place.join(group, place.connect(limit_s), device, START_PATIENCE * limit_s)
            work(group)
    except Exception as error:
        group.pulse.is_consequence = isinstance(error, PeerLost)
        group.pulse.failure = first_line(error)
        if not group.pulse.is_consequence:
            log.exception("rank %d failed", place.rank)
        with suppress(RuntimeError):
            sender.tell()
        logging.shutdown()
        # At once: tearing down a broken group may wait for ranks that are gone.
        os._exit(1)
    sender.stop()
    group.leave()
    return 0


def _serve(config: ServeConfig, group: RankGroup) -> None:
    pipeline = load_pipeline(config, lambda status: group.tick(), group)
    log.info("%s", describe_share(pipeline))
    if config.warmup:
        warm_up(pipeline, lambda done: group.tick())
    obey(pipeline, group)


def obey(pipeline: Pipeline, group: RankGroup) -> None:
    """Says that this rank is ready, then follows rank 0's commands until it says stop."""
    group.agree(True)
    sessions: dict[str, SessionState] = {}
    while True:
        match group.receive():
            case SessionPlan() as plan:
                # A session that this one takes the place of leaves first: there may be room for one window only.
                sessions.pop(plan.session_id, None)
                # Frames are rank 0's: so is what they go through after decode.
                sessions[plan.session_id] = SessionState(pipeline, replace(plan, postprocess=UNCHANGED))
            case ChunkPlan() as plan:
                # Agreed by all: rank 0 said so before one of the forwards.
                with suppress(ChunkCancelled):
                    run_chunk(pipeline, sessions[plan.session_id], plan, lambda group: None)
            case Close(session_id):
                sessions.pop(session_id, None)
                if pipeline.device.type == "cuda":
                    torch.cuda.empty_cache()
            case Stop():
                return


def follow_launcher(config: ServeConfig) -> int:
    """A follower that torchrun started, or rank 0. Raises ConfigError for ranks that cannot be."""
    require_ranks(config)
    place = Place.from_environment()
    assert place is not None, "the launcher says where"
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s [rank {place.rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    return follow(config, place, partial(_serve, config))


if __name__ == "__main__":
    sys.exit(follow_launcher(ServeConfig(**json.loads(sys.argv[1]))))
