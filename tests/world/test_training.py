"""Every training stage at tiny size: it steps, resumes, and ends in a checkpoint folder that serves."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import UMT5EncoderModel

from lingbot_rt.engine.flow_match import FlowSchedule, predict_x0, renoise
from lingbot_rt.models.checkpoint import load_dit, open_checkpoint
from lingbot_rt.models.dit import split_qkv
from lingbot_rt.models.kv_cache import KVCache
from lingbot_rt.models.ray_map import ray_map
from lingbot_rt.models.vae import StreamingVAE
from lingbot_rt.session.camera_path import YAW_DEGREES
from lingbot_rt.shapes import FrameSize
from scripts.world import blend, make_latents, train_dit, train_text, train_vae
from scripts.world.config import TINY
from scripts.world.export import export
from scripts.world.grow import grown_dit, grown_vae
from scripts.world.muon import BatchedMuon
from scripts.world.place_channels import PLACE_CHANNELS, disturb_cells, place_features, token_means
from scripts.world.pose_reader import PoseReader
from scripts.world.render import Renderer
from scripts.world.render_presets import PRESETS
from scripts.world.self_forcing import FAR_POSITION, GeneratedChunks, roll_out
from scripts.world.teacher_forcing import forward
from scripts.world.training_data import SampleIndices, TrajectoryBatch, TrajectoryDataset
from scripts.world.training_loop import Options, save_part
from scripts.world.trajectories import View
from scripts.world.whole_clip import decode, encode, use_whole_clips
from scripts.world.worlds import Prompt, ServedWorld, Start

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run in which each stage was stopped after two steps and resumed for two more."""
    folder = tmp_path_factory.mktemp("run")
    options = Options(folder, TINY, CPU, minutes=60, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        # One log line at the end of each call, however slow the machine is.
        patch.setattr("scripts.world.training_loop.TrainingLoop.LOG_EVERY_S", float("inf"))
        patch.setattr("scripts.world.training_data.NUM_PROMPTS", 48)
        for _ in range(2):
            train_text.train(options)
        for _ in range(2):
            train_vae.train(options, batch=2, clips=2)
        for _ in range(2):
            make_latents.make(Options(folder, TINY, CPU, minutes=60, steps=1), count=1, chunks=4)
        for phase in train_dit.PHASES:
            for _ in range(2):
                train_dit.train(options, phase, batch=2)
    return folder


@pytest.mark.parametrize("stage", ["text", "vae", *train_dit.PHASES])
def test_a_stage_resumes_where_it_stopped(run, stage):
    """Its second call starts at the step where the first one ended, with finite figures."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["stage"] == stage and "loss" in line]
    assert [line["step"] for line in trained] == [2, 4]
    assert all(line["loss"] == line["loss"] < 1e4 for line in trained)
    assert trained[1]["seconds"] > trained[0]["seconds"]


def test_a_text_encoder_whose_rows_are_held(run, tmp_path, monkeypatch):
    """It learns from where it is, and after a stop its rows are still held where they were before all of it."""
    monkeypatch.setattr(train_text, "_FIT_STEPS", 2)
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(run / "model" / part, tmp_path / "model" / part)
    before = UMT5EncoderModel.from_pretrained(tmp_path / "model" / "text_encoder").state_dict()
    for _ in range(2):
        train_text.train(Options(tmp_path, TINY, CPU, minutes=60, steps=2), hold=True)
    after = UMT5EncoderModel.from_pretrained(tmp_path / "model" / "text_encoder").state_dict()
    held = torch.load(tmp_path / "state" / "text.pt", weights_only=True)["parts"]["before"]
    for name, value in before.items():
        assert torch.equal(held[name], value.float())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    figures = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(line["distance"] >= 0 for line in figures if "loss" in line)


def test_the_decoder_alone(run, tmp_path):
    """It learns, while the encoder and the scale of the latents stay what the DiT was trained with."""
    shutil.copytree(run / "model" / "vae", tmp_path / "model" / "vae")
    before = AutoencoderKLWan.from_pretrained(tmp_path / "model" / "vae")
    train_vae.train(Options(tmp_path, TINY, CPU, minutes=60, steps=2), batch=2, clips=2, decoder_only=True)
    after = AutoencoderKLWan.from_pretrained(tmp_path / "model" / "vae")
    assert after.config.latents_std == before.config.latents_std
    assert after.config.latents_mean == before.config.latents_mean
    old, new = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name, value in new.items() if not torch.equal(value, old[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_trajectories_are_added(run):
    """A second call of make_latents adds a file of other trajectories, long ones and first chunks."""
    first, second = (torch.load(path, weights_only=True) for path in sorted((run / "latents").glob("*.pt")))
    assert first["walks"]["latents"].shape == (1, 2, TINY.z_dim, 12, 4, 4)
    assert first["starts"]["latents"].shape == (make_latents.STARTS_PER_WALK, 2, TINY.z_dim, 3, 4, 4)
    for kind, stored in first.items():
        assert not torch.equal(stored["places"], second[kind]["places"])
        places = place_features(stored["places"])[:, None].expand(-1, 2, -1, -1).transpose(2, 3)
        assert torch.allclose(stored["latents"][:, :, -PLACE_CHANNELS:].float(), places[..., None, None], atol=1e-3)
        assert stored["latents"][:, :, :-PLACE_CHANNELS].float().std() > 0.1
        assert not stored["first"][:, :, -PLACE_CHANNELS:].any()


def test_the_vae_leaves_the_place_channels_alone(run):
    """After its training it writes zeros there, and its pictures do not depend on them."""
    vae = use_whole_clips(AutoencoderKLWan.from_pretrained(run / "model" / "vae"))
    with torch.inference_mode():
        mean, _ = encode(vae, torch.rand(1, 3, 5, 32, 32) * 2 - 1)
        noted = mean.clone()
        noted[:, -PLACE_CHANNELS:] = torch.randn(PLACE_CHANNELS, 1, 1, 1)
        assert mean[:, :-PLACE_CHANNELS].abs().min() > 0
        assert not mean[:, -PLACE_CHANNELS:].any()
        assert torch.equal(decode(vae, noted), decode(vae, mean))
    assert vae.config.latents_std[-PLACE_CHANNELS:] == [1.0] * PLACE_CHANNELS


def test_a_vae_without_place_channels_is_refused(tmp_path):
    """Its last channels show pictures, and would be overwritten. The error names the folder and what to run."""
    (tmp_path / "model").mkdir()
    before = AutoencoderKLWan.from_config(TINY.vae | {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
    before.save_pretrained(tmp_path / "model" / "vae")
    options = Options(tmp_path, TINY, CPU, minutes=60, steps=1)
    for stage in (lambda: train_vae.train(options, batch=2, clips=2), lambda: make_latents.make(options, count=1)):
        with pytest.raises(ValueError, match=rf"vae has 4 channels, not {TINY.z_dim}: run scripts.world.grow first"):
            stage()


def test_the_folder_serves(run, tmp_path):
    """The stages leave a checkpoint folder that can be exported, loaded by the serving code and played."""
    total = export(run / "model", TINY, tmp_path / "world")
    assert total == sum(path.stat().st_size for path in (tmp_path / "world").rglob("*") if path.is_file())
    world = ServedWorld(tmp_path / "world", "cpu", Renderer(TINY.size, supersample=1))
    start = Start(View(*torch.tensor([[0.5], [0.5], [0.0], [0.0]]).numpy()), Prompt("a snowy village", 3), seed=0)
    session = world.start(start)
    assert session.step((("w",),) * 3, start.prompt).shape == (9, 32, 32, 3)
    fork = session.fork()
    assert session.step((("l",),) * 3, start.prompt).shape == (12, 32, 32, 3)
    assert fork.step((("j",),) * 3, Prompt("night", 2)).shape == (12, 32, 32, 3)


def test_large_parts_are_split(tmp_path, monkeypatch):
    """A part over the limit becomes shards with an index that lists every tensor."""
    monkeypatch.setattr("scripts.world.training_loop.MAX_FILE_BYTES", 3000)
    save_part(tmp_path, {}, {f"w{i}": torch.full((500,), float(i)) for i in range(5)})
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == [f"w{i}" for i in range(5)]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def dataset_of(folder: Path, stored: int, chunks: int, still: int | None = None) -> TrajectoryDataset:
    """``stored`` walks, of which number ``still`` stands still, and two starts, coded as ``stored_of`` says."""
    walks, starts = stored_of(stored, chunks, 0), stored_of(2, 1, 1000)
    if still is not None:
        walks["relative"][still] = torch.eye(4)
    torch.save({"walks": walks, "starts": starts}, folder / "0000.pt")

    class Words:
        def encode(self, prompt: str) -> torch.Tensor:
            return torch.full((1, 2, 3), float(len(prompt)))

    return TrajectoryDataset(folder, Words(), CPU, seed=0)  # type: ignore[arg-type]


def stored_of(stored: int, chunks: int, more: int) -> dict[str, torch.Tensor]:
    """Latents are ``more`` + 200 x trajectory + 100 x look + frame, the conditions 7 or 9 in place of the frame."""
    code = more + 200 * torch.arange(stored)[:, None, None] + 100 * torch.arange(2)[:, None]
    kind = more // 1000

    def condition(value: int) -> torch.Tensor:
        return (code[..., None, None, None] + value).expand(stored, 2, TINY.z_dim, 3, 4, 4).half()

    frames = (code + torch.arange(3 * chunks))[:, :, None, :, None, None]
    return {
        "latents": frames.expand(-1, -1, TINY.z_dim, -1, 4, 4).half(),
        "first": condition(7),
        "later": condition(9),
        "relative": (2 + kind) * torch.eye(4).repeat(stored, 3 * chunks, 1, 1),  # not the identity: nobody stands still
        "places": (more + 200 * torch.arange(stored)).float()[:, None, None].expand(-1, 3 * chunks, 4),
        "looks": torch.tensor([[0, 1]] * stored) + 2 * kind,
    }


def test_generated_chunks_replace_the_true_ones(tmp_path):
    """A roll-out's chunks are what the next one continues from, but for those that it was given."""
    dataset = dataset_of(tmp_path, stored=2, chunks=6)
    made = GeneratedChunks(dataset)
    near, far = (dataset.draw(np.random.default_rng(1), 1, 4, far_share=share, far_position=7) for share in (0, 1))
    truth = dataset.gather(near).latents
    assert torch.equal(made.gather(near), truth)
    new = torch.full_like(truth, -1)
    made.put(near, new, torch.tensor([2]))
    assert torch.equal(made.gather(near)[:, :2], truth[:, :2])
    assert torch.equal(made.gather(near)[:, 2:], new[:, 2:])
    assert torch.equal(dataset.gather(near).latents, truth)
    assert (dataset.gather(far).start_frames[:, 1] == 21).all()
    both = SampleIndices.joined([far, near])
    assert torch.equal(both.trajectory[1:], near.trajectory)


def test_samples_of_the_dataset(tmp_path):
    """All parts of a chunk are those of its trajectory, look and frames. Far chunks are consecutive, and the first two
    of them, which lack their context, have no weight."""
    num_chunks, still = 4, 2
    dataset = dataset_of(tmp_path, stored=3, chunks=6, still=still)
    indices = dataset.draw(np.random.default_rng(0), 80, num_chunks)
    batch = dataset.gather(indices)
    assert batch.poses.shape == (80, num_chunks, 3, 4, 4)
    code = batch.latents[:, :, 0, :, 0, 0]
    assert torch.equal(code, code[..., :1] + torch.arange(3))
    trajectory, view, frame = code[..., 0] // 200 * 200, code[..., 0] % 200 // 100, code[..., 0] % 100
    assert (frame[:, 0] == 0).all()
    assert (frame[:, 1:].diff(dim=1) == 3).all()
    far = batch.start_frames[:, 1] > 3
    assert 8 < far.sum() < 60
    assert torch.equal(batch.weight[far][0], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert (batch.weight[~far] == 1).all()
    assert torch.equal(frame[~far], batch.start_frames[~far].float())
    # A far sample begins with a start, one that stands still with its own first chunk.
    stands = indices.trajectory[:, 0] == still
    begins = trajectory[:, 0] >= 1000
    assert torch.equal(begins, far & ~stands)
    assert set(trajectory[begins, 0].tolist()) == {1000, 1200}
    assert (trajectory[stands] == 200 * still).all()
    assert (trajectory[:, 1:] < 600).all()
    # The look, the poses and the places are those of the same chunk, and all conditions those of the first one.
    assert torch.equal(view.long(), indices.view)
    assert torch.equal(batch.prompt_of % 4, view.long() + 2 * (trajectory >= 1000))
    scale = torch.where(trajectory == 200 * still, 1, 2 + (trajectory >= 1000))
    assert torch.equal(batch.poses[..., 0, 0, 0], scale.float())
    assert torch.equal(batch.places[..., 0, 0], trajectory)
    shown = batch.conditions[:, :, 4:].flatten(2)
    assert torch.equal(shown, shown[..., :1].expand_as(shown))
    assert torch.equal(shown[:, 0, 0], code[:, 0, 0] + 7)
    assert torch.equal(shown[:, 1:, 0], (code[:, :1, 0] + 9).expand(-1, num_chunks - 1))
    assert batch.conditions[0, :, 0, :, 0, 0].tolist() == [[1, 0, 0]] + [[0, 0, 0]] * (num_chunks - 1)


def test_whole_clips_are_the_serving_codes():
    """All frames of a clip at once give the latents and pictures that the streaming VAE gives frame by frame."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_config(TINY.vae)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2, mean=0.0 if parameter.ndim > 4 else 0.5)
    clips = torch.rand(2, 3, 13, 32, 32) * 2 - 1
    with torch.inference_mode():
        mean, _ = encode(use_whole_clips(copy.deepcopy(vae)), clips)
        pictures = decode(use_whole_clips(copy.deepcopy(vae)), mean)
        streaming = StreamingVAE(vae)
        features = streaming.new_features()
        latents = streaming.encode(clips)
        served = [streaming.decode_latent_frame(one, features) for one in latents[:1].split(1, dim=2)]
    assert torch.allclose(mean, latents, atol=1e-5)
    assert pictures.std() > 0.1
    assert torch.allclose((pictures[:1] / 2 + 0.5).clamp(0, 1), torch.cat(served, dim=2), atol=1e-5)


def test_presets_look_where_keys_reach():
    """As all walks of the training do."""
    assert all(yaw % YAW_DEGREES == 0 for _, _, _, yaw, _, _ in PRESETS.values())


def test_batched_muon_is_torchs():
    """Matrices of three shapes, stepped together or one by one; a kernel is the matrix of its rows."""
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 8), (8, 32)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    batched = BatchedMuon(ours, lr=0.05, weight_decay=0.02)
    single = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        batched.step()
        single.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-3)  # bfloat16 inside
    kernel, matrix = torch.nn.Parameter(torch.ones(4, 2, 3, 1, 1)), torch.nn.Parameter(torch.ones(4, 6))
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1)
    BatchedMuon([kernel]).step()
    BatchedMuon([matrix]).step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.fixture
def dit():
    """A DiT with random weights in every layer, so that no zero hides an error."""
    torch.manual_seed(0)
    dit = train_dit.new_dit(TINY)
    for parameter in dit.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return dit.requires_grad_(False)


def random_batch(num_chunks: int) -> TrajectoryBatch:
    """Two sessions whose prompts change, the second without camera."""
    z, size = TINY.z_dim, FrameSize(32, 48)
    cells = (3, size.latent_height, size.latent_width)
    return TrajectoryBatch(
        latents=torch.randn(2, num_chunks, z, *cells),
        conditions=torch.cat(
            [
                torch.randn(2, 1, z + 4, *cells),
                torch.randn(2, 1, z + 4, *cells).expand(2, num_chunks - 1, -1, -1, -1, -1),
            ],
            1,
        ),
        poses=torch.randn(2, num_chunks, 3, 4, 4),
        places=torch.randn(2, num_chunks, 3, 4),
        camera=torch.tensor([1.0, 0.0]),
        prompts=torch.randn(2, TINY.text_len, TINY.text_dim),
        prompt_of=torch.stack([(torch.arange(num_chunks) > 3).long(), (torch.arange(num_chunks) < 2).long()]),
        start_frames=3 * torch.arange(num_chunks).expand(2, num_chunks),
        weight=torch.ones(2, num_chunks),
    )


def ray_map_of(batch: TrajectoryBatch, session: int, chunk: int) -> torch.Tensor:
    return ray_map(batch.poses[session, chunk].numpy(), FrameSize(32, 48), CPU)


def test_roll_outs_from_given_chunks(dit):
    """What follows given chunks continues from them, anywhere in a session."""
    batch = random_batch(5)
    given = torch.randn_like(batch.latents)
    torch.manual_seed(5)
    some = roll_out(dit, batch, TINY.schedule, given=given, given_B=torch.tensor([2, 0]), position=FAR_POSITION)
    assert torch.equal(some.latents[0, :2], given[0, :2])
    assert not torch.allclose(some.latents[0, 2], given[0, 2])
    torch.manual_seed(5)
    none = roll_out(dit, batch, TINY.schedule, position=FAR_POSITION)
    assert torch.equal(none.latents[1], some.latents[1])
    assert not torch.allclose(none.latents[0, 2], some.latents[0, 2])
    torch.manual_seed(5)
    near = roll_out(dit, batch, TINY.schedule)
    assert torch.equal(near.latents[:, 0], none.latents[:, 0])
    assert not torch.allclose(near.latents[:, 1], none.latents[:, 1])


def test_more_layers_change_nothing_at_first(dit):
    """A deeper DiT gives the same flow until it is trained, and its new blocks then learn."""
    config = dataclasses.replace(TINY, dit_layers=3)
    deep = grown_dit(dit, config)
    batch = random_batch(2)
    inputs = (batch, batch.latents, torch.randn_like(batch.latents), torch.full((2, 2), 500.0))
    flow, _ = forward(deep, *inputs)
    assert torch.allclose(flow, forward(dit, *inputs)[0], atol=1e-5)
    flow.square().mean().backward()
    new = [b for b in deep.blocks if not b.self_attn.o.weight.any()]
    assert len(new) == 1
    assert new[0].self_attn.o.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore")
def test_a_weighted_sum_of_networks(run, tmp_path, monkeypatch, capsys):
    """blend writes the sum into a model folder, which then serves, and refuses what does not add up."""
    folders = [tmp_path / name / "model" for name in ("before", "after", "sum")]
    states = []
    for seed, folder in enumerate(folders):
        shutil.copytree(run / "model", folder)
        torch.manual_seed(seed)
        dit = train_dit.new_dit(TINY)
        states.append(dit.state_dict())
        save_part(folder / "transformer", TINY.transformer, split_qkv(dit.state_dict()))

    def call(*terms) -> None:
        arguments = [str(term) for term in (*terms, "--run-folder", tmp_path / "sum", "--config", "tiny")]
        monkeypatch.setattr("sys.argv", ["blend", *arguments])
        blend.main()

    call(-0.5, folders[0], 1.5, folders[1])
    found = load_dit(open_checkpoint(str(folders[2])), torch.float32, CPU).state_dict()
    for name, value in found.items():
        assert torch.allclose(value, 1.5 * states[1][name] - 0.5 * states[0][name], atol=1e-3), name
    for terms, problem in {
        (0.5, folders[0], 0.4, folders[1]): "add up to 0.9",
        (0.5, folders[0], 0.5): "0.5 has no folder",
        (0.5, folders[0], 0.5, tmp_path / "nothing"): "there is no such folder",
        ("x", folders[0]): "could not convert string to float",
        (0.5, folders[0], 0.5, "builtin"): "other layers or channels than --config tiny",
    }.items():
        with pytest.raises(SystemExit):
            call(*terms)
        assert problem in capsys.readouterr().err


def test_more_channels_change_no_picture(dit):
    """A DiT and a VAE that get place channels make the same pictures, whatever these channels hold."""
    config = dataclasses.replace(TINY, picture_channels=TINY.z_dim)
    batch = random_batch(2)
    noisy, sigma = torch.randn_like(batch.latents), torch.full((2, 2), 500.0)

    def more(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents, torch.randn_like(latents[:, :, :PLACE_CHANNELS])], dim=2)

    wide = dataclasses.replace(batch, latents=more(batch.latents), conditions=more(batch.conditions))
    flow, _ = forward(grown_dit(dit, config), wide, wide.latents, more(noisy), sigma)
    assert torch.allclose(flow[:, :, : TINY.z_dim], forward(dit, batch, batch.latents, noisy, sigma)[0], atol=1e-5)
    assert not flow[:, :, TINY.z_dim :].any()
    vae = use_whole_clips(AutoencoderKLWan.from_config(TINY.vae))
    grown = use_whole_clips(AutoencoderKLWan.from_config(config.vae))
    grown.load_state_dict(grown_vae(vae, config))
    clips = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.inference_mode():
        for got, expected in zip(encode(grown, clips), encode(vae, clips), strict=True):
            assert torch.allclose(got[:, : TINY.z_dim], expected, atol=1e-5)
            assert not got[:, TINY.z_dim :].any()
        mean, _ = encode(vae, clips)
        assert torch.allclose(decode(grown, more(mean.transpose(1, 2)).transpose(1, 2)), decode(vae, mean), atol=1e-5)


def test_the_place_counts_by_its_mean_over_a_token():
    """Noise within tokens costs nothing in the place channels, unlike in the pictures' and unlike a wrong mean."""
    torch.manual_seed(0)
    latents = torch.randn(2, 3, PLACE_CHANNELS + 4, 3, 6, 8)
    disturbed = disturb_cells(latents, 0.75)
    assert torch.equal(disturbed[:, :, :4], latents[:, :, :4])
    assert 0.5 < (disturbed - latents)[:, :, 4:].std() < 0.75
    assert torch.allclose(token_means(disturbed), token_means(latents), atol=1e-6)
    pictures, places = train_dit.errors_of_chunks(disturbed - latents)
    assert not pictures.any()
    assert places.max() < 1e-12
    latents[:, :, 4:] += 0.5
    pictures, places = train_dit.errors_of_chunks(disturbed - latents)
    assert not pictures.any()
    assert torch.allclose(places, torch.full((2, 3), 0.25), atol=1e-5)
    latents[:, :, 0] += 1
    assert torch.allclose(train_dit.errors_of_chunks(disturbed - latents)[0], torch.full((2, 3), 0.25), atol=1e-5)


@pytest.mark.parametrize("steps", [(1000,), (1000, 500), (1000, 600, 300)])
def test_noise_levels_of_teacher_forcing(steps):
    """Seven in ten are the schedule's, and two thirds of these the first step's: pure noise."""
    torch.manual_seed(4)
    schedule = FlowSchedule(2.0, steps)
    sigmas = [step.sigma for step in schedule.steps_for(len(steps))]
    levels = train_dit.noise_levels(torch.Size((100, 100)), schedule, torch.device("cpu"))
    shares = [torch.isclose(levels, torch.tensor(sigma)).double().mean().item() for sigma in sigmas]
    later = len(steps) - 1
    wanted = [0.7 * 0.65, *[0.7 * 0.35 / later] * later] if later else [0.7]
    assert shares == pytest.approx(wanted, abs=0.02)
    assert 0 < levels.min() < 0.1
    assert levels.max() <= 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_worn_contexts_keep_their_places(share, monkeypatch):
    """Faded samples show a third of a picture at most, but all of the first one. About half of the others are
    perfect."""
    monkeypatch.setattr(train_dit, "FADED_SHARE", share)
    torch.manual_seed(3)
    latents = torch.randn(64, 3, 4 + PLACE_CHANNELS, 3, 4, 4)
    worn = train_dit.worn_contexts(latents)
    places = (token_means(each[:, :, 4:]) for each in (worn, latents))
    assert torch.allclose(*places, atol=1e-5)
    shown = ((worn * latents)[:, :, :4].mean((2, 3, 4, 5)) / latents[:, :, :4].square().mean((2, 3, 4, 5))).tolist()
    kept = [first for first, *_ in shown]
    if share:
        assert kept == [1] * 64
        assert 0.1 < max(max(later) for _, *later in shown) < 0.45  # 0.3, and chance
    else:
        assert 16 <= kept.count(1) <= 48
        assert 1 - train_dit.CONTEXT_NOISE - 0.2 < min(kept) < 0.9
        assert all((first == 1) == (later == [1, 1]) for first, *later in shown)


def test_the_pose_is_read_from_tokens():
    """Tokens that hold their place give no error, and only chunks that can know it count among the noisy ones."""
    torch.manual_seed(0)
    places = torch.randn(2, 3, 3, 4)
    reader = PoseReader(PLACE_CHANNELS + 7, num_layers=4)
    features = place_features(places)
    hidden = torch.randn(2, 2, 3, 3, 4, PLACE_CHANNELS + 7)
    hidden[..., :PLACE_CHANNELS] = features[None, :, :, :, None]
    spoilt = hidden.clone()
    spoilt[1, :, 0] = torch.randn(PLACE_CHANNELS + 7)
    optimiser = torch.optim.LBFGS(reader.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = sum(reader.loss([hidden.flatten(3, 4)] * 4, places, torch.ones(2, 3))).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    tokens, spoilt_tokens = hidden.flatten(3, 4), spoilt.flatten(3, 4)
    early, *_, late = reader.layers
    assert early < late < 2, "asked in the first half of four layers"
    after = [spoilt_tokens if layer == early else tokens for layer in range(4)]
    known, told = reader.loss(after, places, torch.tensor([[0.0, 1.0, 1.0]] * 2))
    assert (known < 0.1).all()
    assert (told < 0.1).all()
    first, *_, last = reader.loss(after, places, torch.ones(2, 3))[1]
    assert first > 2 * told[0]
    assert last < 0.1


def cache_of(dit, tokens: int) -> KVCache:
    config = dit.config
    return KVCache(
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        tokens_per_frame=tokens,
        sink_frames=config.sink_frames,
        window_frames=config.window_frames,
        dtype=torch.float32,
        device=CPU,
    )


def test_teacher_forcing_is_the_cached_roll_out(dit):
    """All chunks at once, with concatenated keys, give the flow that the serving classes give chunk by chunk with a
    sliding window, to 1e-5."""
    num_chunks = 7
    batch = random_batch(num_chunks)
    noisy, timesteps = torch.randn_like(batch.latents), 1000 * torch.rand(2, num_chunks).clamp(0.1, 1)
    got, _ = forward(dit, batch, batch.latents, noisy, timesteps)
    for session in range(2):
        cache = cache_of(dit, tokens=6)
        text_kv = [dit.text_kv(prompt[None]) for prompt in batch.prompts]
        for i in range(num_chunks):
            kv = text_kv[int(batch.prompt_of[session, i])]
            camera = dit.camera_modulation(ray_map_of(batch, session, i)) if batch.camera[session] else None

            def serve(latents, timestep, commit=False, i=i, session=session, kv=kv, camera=camera, cache=cache):
                x = torch.cat([latents, batch.conditions[session, i]])[None]
                return dit(x, timestep, kv, camera, cache, 3 * i, commit=commit)

            flow = serve(noisy[session, i], timesteps[session, i].item())
            assert (flow[0] - got[session, i]).abs().max() <= 1e-5 * max(1.0, flow.abs().max().item())
            serve(batch.latents[session, i], 0.0, commit=True)


def test_roll_outs_are_the_serving_codes(dit):
    """Two sessions in one batch get the latents that the first of them gets alone in the serving loop."""
    batch = random_batch(4)
    torch.manual_seed(5)
    rollout = roll_out(dit, batch, TINY.schedule)
    steps = TINY.schedule.steps_for(len(TINY.steps))
    torch.manual_seed(5)
    cache, text_kv = cache_of(dit, tokens=6), dit.text_kv(batch.prompts[:1])
    for i in range(3):
        camera = dit.camera_modulation(ray_map_of(batch, 0, i))
        x = torch.randn(2, *batch.latents.shape[2:])[:1]
        for n, step in enumerate(steps):
            assert torch.allclose(x, rollout.inputs[:1, i, n], atol=1e-4)
            channels = torch.cat([x, batch.conditions[:1, i]], dim=1)
            x0 = predict_x0(x, dit(channels, step.timestep, text_kv, camera, cache, 3 * i), step.sigma)
            if n + 1 < len(steps):
                noise = torch.randn(2, 3, *batch.latents.shape[2:3], *batch.latents.shape[4:])[:1].transpose(1, 2)
                x = renoise(x0, noise, steps[n + 1].sigma)
        dit(torch.cat([x0, batch.conditions[:1, i]], dim=1), 0.0, text_kv, camera, cache, 3 * i, commit=True)
        assert torch.allclose(x0, rollout.latents[:1, i], atol=1e-4)
