"""What the evaluation measures, of any World. Pictures are uint8 [H, W, 3]; the true rendering is always to be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.regression.metrics import psnr
from lingbot_rt.session.controls import NEUTRAL, Actions, Keys
from scripts.world.players import FRAMES_OF_CHUNK, Frames, Prompt, Session, Start, World
from scripts.world.prompts import HELD_OUT
from scripts.world.render import Renderer
from scripts.world.scene import LOOKS
from scripts.world.train_vae import video
from scripts.world.walks import SINGLE, View, branch, random_actions, start_view, walk

HELD_OUT_SEED = 1_000_000
"""Training draws from smaller ones."""

_FIT_ROUNDS, _FIT_CANDIDATES, _FIT_KEPT = 5, 24, 5
_FIT_SPREAD = (0.1, 0.1, 5.0, 3.0)  # x, z, yaw and pitch that a fit begins with


def starts(count: int, purpose: int) -> Iterator[tuple[Start, np.random.Generator]]:
    """Held-out beginnings, the looks in turn, each with a prompt that training never saw."""
    for i in range(count):
        rng = np.random.default_rng((HELD_OUT_SEED, purpose, i))
        yield Start(start_view(rng), _prompt(rng, i % len(LOOKS)), seed=i), rng


def _prompt(rng: np.random.Generator, look: int) -> Prompt:
    texts = [text for text, of in HELD_OUT if of == look]
    return Prompt(texts[rng.integers(len(texts))], look)


def picture(renderer: Renderer, view: View, look: int) -> Frames:
    return renderer.render(view.poses(), [look] * len(view.x)).cpu().numpy()


def vae_psnr(vae: StreamingVAE, renderer: Renderer, clips: int) -> float:
    """Encoded and decoded by the serving code: mean dB of held-out clips of 13 pictures, all looks."""
    scores = []
    for start, rng in starts(clips, purpose=1):
        true = picture(renderer, walk(start.view, random_actions(rng, 4)).view.between(), start.prompt.look)
        with torch.inference_mode():
            latents = vae.encode(video(torch.from_numpy(true)[None]))
            features = vae.new_features()
            got = torch.cat([vae.decode_latent_frame(one, features) for one in latents.split(1, dim=2)], dim=2)
        frames = (got[0].permute(1, 2, 3, 0) * 255).to(torch.uint8).cpu().numpy()
        scores += [psnr(a, b) for a, b in zip(frames, true, strict=True)]
    return float(np.mean(scores))


@dataclass
class Obedience:
    """How often the nearest of the nine true renderings was that of the key held, by key."""

    hits: dict[str, list[bool]] = field(default_factory=lambda: {name_of(keys): [] for keys in SINGLE})

    @property
    def share(self) -> float:
        return float(np.mean([hit for hits in self.hits.values() for hit in hits]))

    @property
    def by_key(self) -> dict[str, float]:
        return {name: float(np.mean(hits)) for name, hits in self.hits.items()}


def name_of(keys: Keys) -> str:
    return "".join(keys) or "none"


def obedience(world: World, renderer: Renderer, states: int, after: int) -> Obedience:
    """One chunk of each single key, after ``after`` chunks: neutral for one, else a walk whose pose is fitted first."""
    found = Obedience()
    coarse = renderer.coarse() if after > 1 else renderer
    for start, rng in starts(states, purpose=2):
        session = world.start(start)
        fitted = after > 1
        actions = random_actions(rng, FRAMES_OF_CHUNK * after) if fitted else (NEUTRAL,) * FRAMES_OF_CHUNK
        last = _play(session, actions, start.prompt)[-1][-1]
        view = walk(start.view, actions).view.at(-1)
        if fitted:
            view = fit(coarse, last, view, start.prompt.look)
        ends = [branch(view, keys, FRAMES_OF_CHUNK).at(-1) for keys in SINGLE]
        truths = np.concatenate([picture(renderer, end, start.prompt.look) for end in ends]).astype(np.float32)
        for i, keys in enumerate(SINGLE):
            got = session.fork().step((keys,) * FRAMES_OF_CHUNK, start.prompt)[-1].astype(np.float32)
            errors = ((truths - got) ** 2).mean(axis=(1, 2, 3))
            found.hits[name_of(keys)].append(int(errors.argmin()) == i)
    return found


def fit(renderer: Renderer, got: Frames, near: View, look: int) -> View:
    """The view whose true rendering is nearest to the picture, searched for around ``near`` (cross-entropy method).

    ``renderer`` may draw smaller pictures than ``got``, by a whole factor.
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
        # Never all certain at once, and the best one stays.
        middle, spread = kept[0], kept.std(0) + 0.05 * spread
    return View(*middle[:, None])


def prompt_switch(world: World, renderer: Renderer, cases: int, within: int = 2) -> float:
    """The share of cases that show the new prompt's look ``within`` chunks after it: of the true renderings in the four
    looks, coarsely compared, the new one's is the nearest."""
    right = []
    for start, rng in starts(cases, purpose=3):
        session = world.start(start)
        new = _prompt(rng, int((start.prompt.look + 1 + rng.integers(len(LOOKS) - 1)) % len(LOOKS)))
        before, after = 2, within
        actions = random_actions(rng, FRAMES_OF_CHUNK * (before + after))
        _play(session, actions[: FRAMES_OF_CHUNK * before], start.prompt)
        got = _play(session, actions[FRAMES_OF_CHUNK * before :], new)[-1][-1]
        view = walk(start.view, actions).view.at(-1)
        truths = [_coarse(picture(renderer, view, look)[0]) for look in range(len(LOOKS))]
        errors = [float(((_coarse(got) - truth) ** 2).mean()) for truth in truths]
        right.append(int(np.argmin(errors)) == new.look)
    return float(np.mean(right))


def _coarse(frame: Frames) -> np.ndarray:
    """Means over an 8 x 4 grid: colours and light, not places."""
    height, width, _ = frame.shape
    rows, columns = height // 4, width // 8
    return frame[: 4 * rows, : 8 * columns].astype(np.float32).reshape(4, rows, 8, columns, 3).mean(axis=(1, 3))


@dataclass
class Rollouts:
    """dB at the measured chunks, by what made the pictures, and pictures for the sheets: [walk][chunk] (true, got)."""

    scores: dict[str, dict[int, float]]
    sheet: list[list[tuple[Frames, Frames]]]


def rollouts(world: World, renderer: Renderer, walks: int, chunks: Sequence[int], *, neutral: bool) -> Rollouts:
    """PSNR against the true rendering at each of ``chunks`` (0 begins with the start picture), beside its baselines:
    the first picture kept, and (``neutral``) the same world with no key pressed."""
    found: dict[str, dict[int, list[float]]] = {}
    sheet: list[list[tuple[Frames, Frames]]] = []

    def add(who: str, chunk: int, got: Frames, true: Frames) -> None:
        scores = [psnr(a, b) for a, b in zip(got, true, strict=True)]
        found.setdefault(who, {}).setdefault(chunk, []).extend(min(score, 99.0) for score in scores)

    for start, rng in starts(walks, purpose=4):
        actions = random_actions(rng, FRAMES_OF_CHUNK * (max(chunks) + 1))
        made = {"generated": _play(world.start(start), actions, start.prompt)}
        if neutral:
            made["always neutral"] = _play(world.start(start), (NEUTRAL,) * len(actions), start.prompt)
        poses = walk(start.view, actions).view.between().poses()
        first = renderer.render(poses[:1], [start.prompt.look]).cpu().numpy()
        row = []
        for chunk in chunks:
            frames = np.arange(max(0, 12 * chunk - 3), 12 * chunk + 9)
            true = renderer.render(poses[frames], [start.prompt.look] * len(frames)).cpu().numpy()
            for who, played in made.items():
                add(who, chunk, played[chunk], true)
            add("first picture kept", chunk, np.broadcast_to(first, true.shape), true)
            row.append((true[-1], made["generated"][chunk][-1]))
        sheet.append(row)
    scores = {who: {chunk: float(np.mean(of)) for chunk, of in by.items()} for who, by in found.items()}
    return Rollouts(scores, sheet)


def long_walk(world: World, renderer: Renderer, walks: int, chunks: int = 60, last: int = 10) -> dict[str, float]:
    """Mean, standard deviation and gradient energy of the last ``last`` chunks' pictures, over the true ones'."""
    sums = {"got": np.zeros(3), "true": np.zeros(3)}
    for start, rng in starts(walks, purpose=5):
        actions = random_actions(rng, FRAMES_OF_CHUNK * chunks)
        played = _play(world.start(start), actions, start.prompt)
        views = walk(start.view, actions).view
        for chunk in range(chunks - last, chunks):
            true = picture(renderer, views.at(FRAMES_OF_CHUNK * (chunk + 1) - 1), start.prompt.look)[0]
            sums["got"] += statistics(played[chunk][-1])
            sums["true"] += statistics(true)
    return dict(zip(("mean", "std", "gradient"), (sums["got"] / sums["true"]).tolist(), strict=True))


def statistics(frame: Frames) -> np.ndarray:
    """Mean, standard deviation, and mean square of the differences between neighbouring pixels."""
    x = frame.astype(np.float64)
    return np.array([x.mean(), x.std(), (np.diff(x, axis=0) ** 2).mean() + (np.diff(x, axis=1) ** 2).mean()])


def contact_sheet(rows: list[list[tuple[Frames, Frames]]]) -> Frames:
    """True above generated, a pair of rows a walk, columns in time."""
    lines = [np.concatenate([pair[i] for pair in row], axis=1) for row in rows for i in (0, 1)]
    return np.concatenate(lines)


def _play(session: Session, actions: Actions, prompt: Prompt) -> list[Frames]:
    """Chunk after chunk."""
    return [session.step(actions[i : i + FRAMES_OF_CHUNK], prompt) for i in range(0, len(actions), FRAMES_OF_CHUNK)]
