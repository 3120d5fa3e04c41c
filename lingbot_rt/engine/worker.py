"""The process of a rank other than 0: it joins, loads the model, then runs what rank 0 sends until told to stop.

Rank 0 starts it as ``python -m lingbot_rt.engine.worker CONFIG``. Under torchrun ``lingbot-rt serve`` calls
``run_launched_worker``.
"""

from __future__ import annotations

import dataclasses
import gc
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
from lingbot_rt.engine.going_back import set_back
from lingbot_rt.engine.memory import describe_share, release_unused, share_room
from lingbot_rt.engine.pipeline import Pipeline, load_pipeline
from lingbot_rt.engine.session_state import SessionState
from lingbot_rt.engine.warmup import warm_up, warm_up_shape
from lingbot_rt.engine.world import go_on_from, read_snapshot
from lingbot_rt.errors import ChunkCancelled, PeerLost, UnsoundFrames, one_line
from lingbot_rt.parallel.coordinator import AskRoom, Close, Move, OpenFrom, Rewind, Stop, WarmUpShape
from lingbot_rt.parallel.groups import RankGroup
from lingbot_rt.parallel.launch import RankInfo, require_ranks, uses_cuda
from lingbot_rt.parallel.watchdog import START_PATIENCE, HeartbeatSender
from lingbot_rt.session.plan import UNCHANGED, ChunkPlan, SessionPlan

log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "lingbot_rt.engine.worker")


def worker_command(config: ServeConfig) -> list[str]:
    """The command line of a worker process."""
    # A worker does not need the API key, and command lines are visible to other users.
    return [*_COMMAND, json.dumps(dataclasses.asdict(replace(config, api_key=None)))]


def run_worker(config: ServeConfig, info: RankInfo, work: Callable[[RankGroup], None]) -> int:
    """Joins the ranks and does ``work``; returns the exit code. After an error it tells rank 0 and exits with 1."""
    # Ctrl-C reaches every process of a terminal. Rank 0 tells the workers when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    group = RankGroup(info.rank, info.world)
    limit_s = config.rank_timeout_s
    sender = HeartbeatSender(info.connect(limit_s), info.rank, group.heartbeat, limit_s, lambda: os._exit(1))
    sender.start()
    try:
        with torch.inference_mode():
            device = info.device("cuda" if uses_cuda(config) else "cpu")
            info.join(group, info.connect(limit_s), device, START_PATIENCE * limit_s)
            work(group)
    except Exception as error:
        # In this order: the watchdog must not read the error before it knows whose it is.
        group.heartbeat.is_peer_lost = isinstance(error, PeerLost)
        group.heartbeat.error = one_line(error)
        if not group.heartbeat.is_peer_lost:
            log.exception("rank %d failed", info.rank)
        with suppress(RuntimeError):
            sender.send()
        logging.shutdown()
        # At once: an orderly exit of a broken group may wait for ranks that are gone.
        os._exit(1)
    sender.stop()
    group.leave()
    return 0


def _serve(config: ServeConfig, group: RankGroup) -> None:
    pipeline = load_pipeline(config, lambda status: group.tick(), group)
    log.info("%s", describe_share(pipeline))
    if config.warmup:
        warm_up(pipeline, lambda done: group.tick())
    worker_loop(pipeline, group)


def worker_loop(pipeline: Pipeline, group: RankGroup) -> None:
    """Tells rank 0 that this rank is ready, then runs its commands until Stop."""
    gc.collect()
    gc.freeze()  # what was loaded stays: a full collection would hold up all ranks
    group.agree(True)
    sessions: dict[str, SessionState] = {}
    while True:
        match group.receive(AskRoom, WarmUpShape, SessionPlan, OpenFrom, ChunkPlan, Rewind, Move, Close, Stop):
            case AskRoom(plan):
                share_room(pipeline, plan)
            case WarmUpShape(plan):
                with suppress(ChunkCancelled):
                    warm_up_shape(pipeline, plan)
            case SessionPlan() as plan:
                # The session that this one replaces goes first: there may be memory for one window only.
                _close(sessions, plan.session_id)
                # Only rank 0 has frames to upscale or interpolate.
                sessions[plan.session_id] = SessionState(pipeline, replace(plan, postprocess=UNCHANGED))
            case OpenFrom(plan, world):
                snapshot = read_snapshot(pipeline, plan, world)
                session = sessions[plan.session_id] = SessionState(pipeline, replace(plan, postprocess=UNCHANGED))
                with suppress(ChunkCancelled):
                    go_on_from(pipeline, session, snapshot)
            case ChunkPlan() as plan:
                # All ranks agree on a cancelled chunk, and stop before the same forward or decode.
                with suppress(ChunkCancelled, UnsoundFrames):
                    run_chunk(pipeline, sessions[plan.session_id], plan, lambda group: None)
            case Rewind(session_id, chunk_index, branch, keep):
                session = sessions[session_id]
                with suppress(ChunkCancelled):
                    set_back(pipeline, session, session.history.go_back(branch, chunk_index, keep=keep), chunk_index)
            case Move(session_id, to_host):
                sessions[session_id].move(torch.device("cpu") if to_host else pipeline.device)
                if to_host:
                    release_unused(pipeline.device)
            case Close(session_id):
                _close(sessions, session_id)
                release_unused(pipeline.device)
            case Stop():
                return


def _close(sessions: dict[str, SessionState], session_id: str) -> None:
    session = sessions.pop(session_id, None)
    if session is not None:
        session.release()


def run_launched_worker(config: ServeConfig) -> int:
    """The whole process of a worker whose rank is in the environment. Raises ConfigError as ``require_ranks`` does."""
    require_ranks(config)
    info = RankInfo.from_environment()
    assert info is not None, "rank 0 or torchrun has set the variables"
    logging.basicConfig(
        level=config.log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s [rank {info.rank}] %(message)s",
        datefmt="%H:%M:%S",
    )
    return run_worker(config, info, partial(_serve, config))


if __name__ == "__main__":
    sys.exit(run_launched_worker(ServeConfig(**json.loads(sys.argv[1]))))
