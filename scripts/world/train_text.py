"""Stage 1: trains the tokenizer and the UMT5 text encoder. A CPU does it in minutes.

    python -m scripts.world.train_text
    python -m scripts.world.train_text --hold

A linear layer classifies the prompt's look from each of the encoder's rows. Later stages do not train the encoder, so
each prompt is encoded once.

With --hold the encoder of the run's model/ is trained on, and its rows are held near where they were: a DiT that knows
them stays valid. So prompts that were misread can be mended at the end.
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
from scripts.world.prompts import HELD_OUT, sample_prompt
from scripts.world.scene import LOOKS
from scripts.world.training_loop import (
    Options,
    Stateful,
    TrainingLoop,
    learning_rate,
    save_part,
    set_learning_rate,
)

BATCH = 96
PEAK_RATE = 2e-3
HOLD_RATE = 1e-3
HOLD_WEIGHT = 20.0
"""Of the squared distance to the rows of before, where the prompt was understood."""

_FIT_STEPS = 150
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"


def train_tokenizer(folder: Path, config: WorldConfig) -> PreTrainedTokenizerFast:
    """A BPE trained on random prompts. Its bytes give every text tokens. If ``folder`` has one, that is loaded."""
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
    tokenizer.train_from_iterator((sample_prompt(rng)[0] for _ in range(2000)), trainer)
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


class LookClassifier(nn.Module):
    """The encoder and a linear layer that predicts the look from each of its rows."""

    def __init__(self, config: WorldConfig) -> None:
        super().__init__()
        self.encoder = UMT5EncoderModel(UMT5Config(**config.text_encoder))
        self.look = nn.Linear(config.text_dim, len(LOOKS))

    def rows(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D]"""
        return self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state


def train(options: Options, hold: bool = False) -> float:
    """Trains the text encoder and returns the share of HELD_OUT prompts whose look is predicted right."""
    config = options.config
    tokenizer = train_tokenizer(options.model / "tokenizer", config)
    torch.manual_seed(options.seed)
    classifier = LookClassifier(config).to(options.device)
    peak, decay = (HOLD_RATE, 0.0) if hold else (PEAK_RATE, 0.02)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=peak, weight_decay=decay)
    parts: dict[str, Stateful] = {"reader": classifier, "optimiser": optimiser}
    before = None
    if hold:
        folder = options.model / "text_encoder"
        before = UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
        classifier.encoder.load_state_dict(before.state_dict())
        parts["before"] = before  # when it resumes, model/ has another one
    loop = TrainingLoop("text", options, parts)
    if hold and loop.step == 0:
        _fit_look(classifier, tokenizer, config)
    for step in loop:
        set_learning_rate([optimiser], learning_rate(loop, peak, warm_steps=50))
        ids, mask, looks = _batch(np.random.default_rng((options.seed, step)), tokenizer, config, options.device)
        rows = classifier.rows(ids, mask)
        loss = nn.functional.cross_entropy(classifier.look(rows[mask]), looks[mask])
        if before is not None:
            with torch.no_grad():
                held = before(input_ids=ids, attention_mask=mask).last_hidden_state
                is_understood = mask & (classifier.look(held).argmax(-1) == looks)
            distance = (rows - held)[is_understood].square().mean()
            loop.record(distance=distance)
            loss = loss + HOLD_WEIGHT * distance
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimiser.step()
        loop.record(loss=loss)
    state = classifier.encoder.state_dict()
    state.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
    save_part(options.model / "text_encoder", config.text_encoder, state, name="model")
    right, wrong = 0, []
    encoder = TextEncoder(tokenizer, classifier.encoder.eval(), config.text_len)
    with torch.no_grad():
        for prompt, look in HELD_OUT:
            rows = encoder.encode(prompt)[:, : len(encoder.token_ids(prompt))]
            predicted = int(classifier.look(rows).mean(1).argmax())
            right += predicted == look
            wrong += [] if predicted == look else [f"{prompt} -> {LOOKS[predicted].name}"]
    loop.log(held_out=right / len(HELD_OUT), misread=wrong)
    return right / len(HELD_OUT)


def _fit_look(classifier: LookClassifier, tokenizer: PreTrainedTokenizerFast, config: WorldConfig) -> None:
    """Trains the linear layer of a trained encoder, as it is not kept with it."""
    optimiser = torch.optim.AdamW(classifier.look.parameters(), lr=1e-2)
    for step in range(_FIT_STEPS):
        ids, mask, looks = _batch(np.random.default_rng((1, step)), tokenizer, config, classifier.look.weight.device)
        with torch.no_grad():
            rows = classifier.rows(ids, mask)
        loss = nn.functional.cross_entropy(classifier.look(rows[mask]), looks[mask])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _batch(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, config: WorldConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random prompts: token ids, which of them count, and the prompt's look, each [B, L]."""
    prompts, looks = zip(*(sample_prompt(rng) for _ in range(BATCH)), strict=True)
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    rows = tokenizer(cleaned, truncation=True, max_length=config.text_len, padding=True, return_tensors="pt")
    ids, mask = rows["input_ids"].to(device), rows["attention_mask"].bool().to(device)
    return ids, mask, torch.tensor(looks, device=device)[:, None].expand_as(ids)


if __name__ == "__main__":
    hold = ("--hold", {"action": "store_true", "help": "train the encoder of model/ on, its rows held in their places"})
    options, args = Options.parse(__doc__, minutes=2, extra=(hold,))
    train(options, args.hold)
