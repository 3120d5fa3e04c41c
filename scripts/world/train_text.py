"""Stage 1: the tokenizer, and a UMT5 whose every row tells the look that a prompt asks for. A CPU does it in minutes.

    python -m scripts.world.train_text

The encoder is trained here, by a linear reading of each of its rows, and stays as it is afterwards: the DiT learns to
read it, and each prompt is encoded once for the whole training.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lingbot_rt.models.text_encoder import TextEncoder, clean_prompt
from scripts.world.config import WorldConfig
from scripts.world.prompts import HELD_OUT, sample
from scripts.world.scene import LOOKS
from scripts.world.stage import Options, Stage, learning_rate, save_part, set_rate

BATCH = 96
PEAK_RATE = 2e-3
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def train_tokenizer(folder: Path, config: WorldConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that every text has tokens; pieces from the prompts of prompts.py. Made once a run."""
    if (folder / "tokenizer_config.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[_PAD, _END, _UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    tokenizer.train_from_iterator((sample(rng)[0] for _ in range(2000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": _END,
        "model_max_length": config.text_len,
        "pad_token": _PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _UNKNOWN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(folder)


class Reader(nn.Module):
    """The encoder and the linear layer that reads a look from each row."""

    def __init__(self, config: WorldConfig) -> None:
        super().__init__()
        self.encoder = UMT5EncoderModel(UMT5Config(**config.text_encoder))
        self.look = nn.Linear(config.text_dim, len(LOOKS))

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Logits [B, L, looks]."""
        return self.look(self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state)


def train(options: Options) -> float:
    """The share of HELD_OUT's prompts that are understood."""
    config = options.config
    tokenizer = train_tokenizer(options.model / "tokenizer", config)
    torch.manual_seed(options.seed)
    reader = Reader(config).to(options.device)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=PEAK_RATE, weight_decay=0.02)
    stage = Stage("text", options, {"reader": reader, "optimiser": optimiser})
    for step in stage:
        set_rate([optimiser], learning_rate(stage, PEAK_RATE, warm_steps=50))
        rng = np.random.default_rng((options.seed, step))
        prompts, looks = zip(*(sample(rng) for _ in range(BATCH)), strict=True)
        ids, mask = (part.to(options.device) for part in _tokens(tokenizer, prompts, config))
        logits = reader(ids, mask)
        target = torch.tensor(looks, device=options.device)[:, None].expand_as(ids)
        loss = nn.functional.cross_entropy(logits[mask.bool()], target[mask.bool()])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        stage.note(loss=loss)
    state = reader.encoder.state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
    save_part(options.model / "text_encoder", config.text_encoder, state, name="model")
    right, wrong = 0, []
    encoder = TextEncoder(tokenizer, reader.encoder.eval(), config.text_len)
    with torch.no_grad():
        for prompt, look in HELD_OUT:
            rows = encoder.encode(prompt)[:, : len(encoder.token_ids(prompt))]
            read = int(reader.look(rows).mean(1).argmax())
            right += read == look
            wrong += [] if read == look else [f"{prompt} -> {LOOKS[read].name}"]
    stage.log(held_out=right / len(HELD_OUT), misread=wrong)
    return right / len(HELD_OUT)


def _tokens(tokenizer: PreTrainedTokenizerFast, prompts: tuple[str, ...], config: WorldConfig) -> tuple[Tensor, Tensor]:
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    rows = tokenizer(cleaned, truncation=True, max_length=config.text_len, padding=True, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]


if __name__ == "__main__":
    train(Options.parse(__doc__, minutes=2)[0])
