"""The metrics of the evaluation. Each compares a World with the renderer, which gives the true picture of any view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.regression.metrics import psnr
from lingbot_rt.session.camera_path import YAW_DEGREES
from lingbot_rt.session.controls import NEUTRAL, Actions, Keys
from lingbot_rt.shapes import VAE_TEMPORAL_STRIDE
from scripts.world.config import CHUNK_FRAMES
from scripts.world.prompts import HELD_OUT
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.train_vae import video
from scripts.world.trajectories import SINGLE_KEYS, View, branch, make_trajectory, random_actions, start_view
from scripts.world.worlds import Frames, Prompt, Session, Start, World

HELD_OUT_SEED = 1_000_000
"""Training uses smaller seeds."""

_PERFECT_DB = 99.0  # of equal pictures, to keep means finite
_OTHER_VIEWS = 8  # random views that a full turn is compared with
_FIT_ROUNDS, _FIT_CANDIDATES, _FIT_KEPT = 5, 24, 5
_FIT_SPREAD = (0.1, 0.1, 5.0, 3.0)  # initial standard deviations of x, z, yaw and pitch


def held_out_starts(count: int, purpose: int, *, plain: bool = False) -> Iterator[tuple[Start, np.random.Generator]]:
    """Held-out views, looks in turn, prompts that training never uses, and a generator for the rest of each case.

    ``plain``: with the look's first prompt, whose look is certain, where words are not what is measured.
    """
    for i in range(count):
        rng = np.random.default_rng((HELD_OUT_SEED, purpose, i))
        look = i % len(LOOKS)
        start, prompt = start_view(rng), _prompt(rng, look)
        if plain:
            prompt = Prompt(next(text for text, of in HELD_OUT if of == look), look)
        yield Start(start, prompt, seed=i), rng


def _prompt(rng: np.random.Generator, look: int) -> Prompt:
    texts = [text for text, of in HELD_OUT if of == look]
    return Prompt(texts[rng.integers(len(texts))], look)


def picture(renderer: Renderer, view: View, look: int) -> Frames:
    """The true pictures of ``view``, one per entry."""
    return _pictures(renderer, view.poses(), look)


def _pictures(renderer: Renderer, poses: np.ndarray, look: int) -> Frames:
    """The true pictures of c2w ``poses`` [n, 4, 4]."""
    return renderer.render(poses, [look] * len(poses)).cpu().numpy()


def vae_psnr(vae: StreamingVAE, renderer: Renderer, clips: int) -> float:
    """Mean dB of held-out clips of 13 pictures in all looks, encoded and decoded by the serving code."""
    scores = []
    for start, rng in held_out_starts(clips, purpose=1):
        true = picture(
            renderer, make_trajectory(start.view, random_actions(rng, 4)).view.pixel_frames(), start.prompt.look
        )
        with torch.inference_mode():
            latents = vae.encode(video(torch.from_numpy(true)[None]))
            features = vae.new_features()
            got = torch.cat([vae.decode_latent_frame(one, features) for one in latents.split(1, dim=2)], dim=2)
        frames = (got[0].permute(1, 2, 3, 0) * 255).to(torch.uint8).cpu().numpy()
        scores += [_psnr(a, b) for a, b in zip(frames, true, strict=True)]
    return float(np.mean(scores))


@dataclass
class Obedience:
    """Per key: whether the nearest of the nine keys' true renderings was that of the key held."""

    hits: dict[str, list[bool]] = field(default_factory=lambda: {key_name(keys): [] for keys in SINGLE_KEYS})

    @property
    def share(self) -> float:
        return float(np.mean([hit for hits in self.hits.values() for hit in hits]))

    @property
    def by_key(self) -> dict[str, float]:
        return {name: float(np.mean(hits)) for name, hits in self.hits.items()}


def key_name(keys: Keys) -> str:
    return "".join(keys) or "none"


def obedience(world: World, renderer: Renderer, states: int, after: int) -> Obedience:
    """One chunk of each single key after ``after`` chunks.

    If ``after`` is 1, no key is held before. Otherwise the keys are random, and the pose is fitted to the last picture.
    """
    result = Obedience()
    coarse = renderer.coarse() if after > 1 else renderer
    for start, rng in held_out_starts(states, purpose=2):
        session = world.start(start)
        fitted = after > 1
        actions = random_actions(rng, CHUNK_FRAMES * after) if fitted else (NEUTRAL,) * CHUNK_FRAMES
        last = _play(session, actions, start.prompt)[-1][-1]
        view = make_trajectory(start.view, actions).view.at(-1)
        if fitted:
            view = fit_view(coarse, last, view, start.prompt.look)
        ends = [branch(view, keys, CHUNK_FRAMES).at(-1) for keys in SINGLE_KEYS]
        truths = np.concatenate([picture(renderer, end, start.prompt.look) for end in ends]).astype(np.float32)
        for i, keys in enumerate(SINGLE_KEYS):
            got = session.fork().step((keys,) * CHUNK_FRAMES, start.prompt)[-1].astype(np.float32)
            errors = ((truths - got) ** 2).mean(axis=(1, 2, 3))
            result.hits[key_name(keys)].append(int(errors.argmin()) == i)
    return result


def fit_view(renderer: Renderer, got: Frames, near: View, look: int) -> View:
    """The view whose true rendering is nearest to ``got``, by a cross-entropy search around ``near``.

    The renderer's pictures may be smaller than ``got`` by a whole factor.
    """
    rng = np.random.default_rng(0)
    middle = np.array([near.x[0], near.z[0], near.yaw[0], near.pitch[0]])
    spread = np.array(_FIT_SPREAD)
    target = torch.from_numpy(got).to(renderer.device).float().permute(2, 0, 1)
    factor = got.shape[1] // renderer.size.width
    target = torch.nn.functional.avg_pool2d(target, factor).permute(1, 2, 0)
    for _ in range(_FIT_ROUNDS):
        tried = middle + spread * rng.standard_normal((_FIT_CANDIDATES, 4))
        tried[0] = middle
        tried[:, 3] = tried[:, 3].clip(-88, 88)
        shown = renderer.render(View(*tried.T).poses(), [look] * len(tried)).float()
        kept = tried[(shown - target).square().mean(dim=(1, 2, 3)).argsort()[:_FIT_KEPT].cpu().numpy()]
        # The best candidate is kept, and the spread never becomes zero.
        middle, spread = kept[0], kept.std(0) + 0.05 * spread
    return View(*middle[:, None])


def prompt_switch(world: World, renderer: Renderer, cases: int, within: int = 2) -> float:
    """The share of cases that show a new prompt's look ``within`` chunks after it.

    A case does if, of the true renderings in the four looks, the one in the new look is nearest on an 8 x 4 grid.
    """
    right = []
    for start, rng in held_out_starts(cases, purpose=3):
        session = world.start(start)
        new = _prompt(rng, int((start.prompt.look + 1 + rng.integers(len(LOOKS) - 1)) % len(LOOKS)))
        before, after = 2, within
        actions = random_actions(rng, CHUNK_FRAMES * (before + after))
        _play(session, actions[: CHUNK_FRAMES * before], start.prompt)
        got = _play(session, actions[CHUNK_FRAMES * before :], new)[-1][-1]
        view = make_trajectory(start.view, actions).view.at(-1)
        truths = [_coarse(picture(renderer, view, look)[0]) for look in range(len(LOOKS))]
        errors = [float(((_coarse(got) - truth) ** 2).mean()) for truth in truths]
        right.append(int(np.argmin(errors)) == new.look)
    return float(np.mean(right))


def _coarse(frame: Frames) -> np.ndarray:
    """Means over an 8 x 4 grid, which keep colour and light and lose detail."""
    height, width, _ = frame.shape
    rows, columns = height // 4, width // 8
    return frame[: 4 * rows, : 8 * columns].astype(np.float32).reshape(4, rows, 8, columns, 3).mean(axis=(1, 3))


@dataclass
class Rollouts:
    """Mean dB per source of pictures and chunk, and the contact sheet's pictures: [trajectory][chunk] (true, got)."""

    scores: dict[str, dict[int, float]]
    sheet: list[list[tuple[Frames, Frames]]]


def rollouts(world: World, renderer: Renderer, count: int, chunks: Sequence[int], *, neutral: bool) -> Rollouts:
    """PSNR against the true rendering at each of ``chunks``, where 0 is the first, and that of two baselines.

    The baselines are the first picture kept and, if ``neutral``, the same world with no key held.
    """
    found: dict[str, dict[int, list[float]]] = {}
    sheet: list[list[tuple[Frames, Frames]]] = []

    def add(source: str, chunk: int, got: Frames, true: Frames) -> None:
        found.setdefault(source, {}).setdefault(chunk, []).extend(_psnr(a, b) for a, b in zip(got, true, strict=True))

    for start, rng in held_out_starts(count, purpose=4):
        actions = random_actions(rng, CHUNK_FRAMES * (max(chunks) + 1))
        played = {"generated": _play(world.start(start), actions, start.prompt)}
        if neutral:
            played["always neutral"] = _play(world.start(start), (NEUTRAL,) * len(actions), start.prompt)
        poses = make_trajectory(start.view, actions).view.pixel_frames().poses()
        first = renderer.render(poses[:1], [start.prompt.look]).cpu().numpy()
        row = []
        for chunk in chunks:
            frames = np.arange(max(0, 12 * chunk - 3), 12 * chunk + 9)
            true = renderer.render(poses[frames], [start.prompt.look] * len(frames)).cpu().numpy()
            for source, frames_of_chunk in played.items():
                add(source, chunk, frames_of_chunk[chunk], true)
            add("first picture kept", chunk, np.broadcast_to(first, true.shape), true)
            row.append((true[-1], played["generated"][chunk][-1]))
        sheet.append(row)
    means = {
        source: {chunk: float(np.mean(scores)) for chunk, scores in of_chunk.items()}
        for source, of_chunk in found.items()
    }
    return Rollouts(means, sheet)


def long_rollout(world: World, renderer: Renderer, count: int, chunks: int = 60, last: int = 10) -> dict[str, float]:
    """Ratios of mean, standard deviation and gradient energy to the truth's, over the last ``last`` chunks."""
    sums = {"got": np.zeros(3), "true": np.zeros(3)}
    for start, rng in held_out_starts(count, purpose=5):
        actions = random_actions(rng, CHUNK_FRAMES * chunks)
        played = _play(world.start(start), actions, start.prompt)
        views = make_trajectory(start.view, actions).view
        for chunk in range(chunks - last, chunks):
            true = picture(renderer, views.at(CHUNK_FRAMES * (chunk + 1) - 1), start.prompt.look)[0]
            sums["got"] += statistics(played[chunk][-1])
            sums["true"] += statistics(true)
    return dict(zip(("mean", "std", "gradient"), (sums["got"] / sums["true"]).tolist(), strict=True))


def statistics(frame: Frames) -> np.ndarray:
    """Mean, standard deviation and gradient energy: the mean squared difference between neighbouring pixels."""
    x = frame.astype(np.float64)
    return np.array([x.mean(), x.std(), (np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean()])


@dataclass
class Turn:
    """Means over the sessions of a full turn, in dB but for ``turned``, and the contact sheet's pictures."""

    psnr: float  # the last picture to the first view
    random_view: float  # the last picture to random true views of the same look
    above: float  # the difference, where a session that did not turn right counts at most 0
    turned: float  # the share of sessions that did
    sheet: list[list[tuple[Frames, Frames]]]  # every second chunk's last picture: [session][column] (true, got)


def full_turn(world: World, renderer: Renderer, count: int) -> Turn:
    """Holds key `l` for 360 degrees, and compares the last picture with the first view and with random views.

    A world that keeps its first picture, or turns left, also ends at the first view. So a quarter of the turn in, the
    nearest of the true views at 0, 90, 180 and 270 degrees must be that at 90. The first latent frame never moves:
    the turn ends one latent frame after 20 chunks, and no key is held for the rest of that chunk.
    """
    turn = 360 // YAW_DEGREES  # latent frames
    actions: Actions = (("l",),) * (turn + 1)
    actions += (NEUTRAL,) * (-len(actions) % CHUNK_FRAMES)
    to_first, to_random, above, turned = [], [], [], []
    sheet = []
    for start, rng in held_out_starts(count, purpose=6, plain=True):
        look = start.prompt.look
        played = _play(world.start(start), actions, start.prompt)
        poses = make_trajectory(start.view, actions).view.poses()
        others = _pictures(renderer, np.concatenate([start_view(rng).poses() for _ in range(_OTHER_VIEWS)]), look)
        quarters = _pictures(renderer, poses[: turn : turn // 4], look)
        last = played[-1][-1]
        to_first.append(_psnr(last, quarters[0]))
        to_random.append(float(np.mean([_psnr(last, other) for other in others])))
        quarter_way = np.concatenate(played)[VAE_TEMPORAL_STRIDE * (turn // 4)]
        turned.append(int(np.argmax([_psnr(quarter_way, true) for true in quarters])) == 1)
        gain = to_first[-1] - to_random[-1]
        above.append(gain if turned[-1] else min(gain, 0.0))
        truths = _pictures(renderer, poses[CHUNK_FRAMES - 1 :: 2 * CHUNK_FRAMES], look)
        sheet.append([(true, frames[-1]) for true, frames in zip(truths, played[::2], strict=True)])
    return Turn(
        psnr=float(np.mean(to_first)),
        random_view=float(np.mean(to_random)),
        above=float(np.mean(above)),
        turned=float(np.mean(turned)),
        sheet=sheet,
    )


def standing_still(world: World, renderer: Renderer, count: int, chunks: int = 60) -> dict[str, float]:
    """Mean dB of the last picture after ``chunks`` to the first view, without camera control and with no key held."""
    still: dict[str, Actions | None] = {"no camera": None, "no key": (NEUTRAL,) * CHUNK_FRAMES}
    found: dict[str, list[float]] = {name: [] for name in still}
    for start, _ in held_out_starts(count, purpose=7, plain=True):
        first = picture(renderer, start.view, start.prompt.look)[0]
        for name, actions in still.items():
            session = world.start(start)
            for _ in range(chunks):
                last = session.step(actions, start.prompt)[-1]
            found[name].append(_psnr(last, first))
    return {name: float(np.mean(scores)) for name, scores in found.items()}


def walk_beside_truth(world: World, renderer: Renderer, chunks: int) -> Iterator[Frames]:
    """The pictures of one walk, level with random keys, true left and generated right: uint8 [2 H, 4 W, 3]."""
    start, rng = next(held_out_starts(1, purpose=8))
    random = random_actions(rng, CHUNK_FRAMES * chunks)
    actions = tuple(tuple(key for key in keys if key not in "ik") for keys in random)
    poses = make_trajectory(start.view, actions).view.pixel_frames().poses()
    session = world.start(start)
    for chunk in range(chunks):
        got = session.step(actions[CHUNK_FRAMES * chunk : CHUNK_FRAMES * (chunk + 1)], start.prompt)
        true = _pictures(renderer, poses[: len(got)], start.prompt.look)
        poses = poses[len(got) :]
        yield from np.concatenate([true, got], axis=2).repeat(2, axis=1).repeat(2, axis=2)


def contact_sheet(rows: list[list[tuple[Frames, Frames]]]) -> Frames:
    """A pair of rows per trajectory, true above generated; one column per chunk."""
    lines = [np.concatenate([pair[i] for pair in row], axis=1) for row in rows for i in (0, 1)]
    return np.concatenate(lines)


def _play(session: Session, actions: Actions, prompt: Prompt) -> list[Frames]:
    """The frames of each chunk."""
    return [session.step(actions[i : i + CHUNK_FRAMES], prompt) for i in range(0, len(actions), CHUNK_FRAMES)]


def _psnr(got: Frames, true: Frames) -> float:
    return min(psnr(got, true), _PERFECT_DB)
