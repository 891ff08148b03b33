"""The builtin policy `tiny`: about a million parameters that have read a little arithmetic, made on this machine.

It exists so that learning can be seen in a minute on one core: it answers in the right form, and is often wrong.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# How a problem is put. The last one is much longer, so it is read less often.
SHORT = ("{} =", "{} = ?")
LONG = "State the final answer to the following arithmetic problem: {} ="
STEPS = 200
LONG_EVERY = 5


def write_tiny(folder: Path, seed: int) -> None:
    """Train tiny from scratch and save it as an ordinary folder; under a minute on one thread."""
    from trimtab.policies.builtin import character_llama, character_tokenizer

    tokenizer = character_tokenizer()
    model = character_llama(
        tokenizer,
        seed,
        spread=0.05,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    teach(model, tokenizer, seed, STEPS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def teach(model: Any, tokenizer: Any, seed: int, steps: int) -> None:
    """Supervised steps on sums and differences: cross-entropy of the answer's characters, AdamW, one cycle."""
    dice = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(steps, 1), pct_start=0.1)
    model.train()
    for step in range(steps):
        form, rows = (LONG, 32) if step % LONG_EVERY == 0 else (dice.choice(SHORT), 64)
        ids, target = examples(tokenizer, [_problem(dice, form) for _ in range(rows)])
        logits = model(input_ids=ids[:, :-1]).logits  # padding is on the right, where nothing looks
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _problem(dice: random.Random, form: str) -> tuple[str, str]:
    """A sum or difference of numbers below 10 (two in three times) or 100, and its answer after a space."""
    top = 9 if dice.random() < 2 / 3 else 99
    a, b, plus = dice.randint(0, top), dice.randint(0, top), dice.random() < 0.5
    return form.format(f"{a} {'+' if plus else '-'} {b}"), f" {a + b if plus else a - b}"


def examples(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids `[N, L]`, and targets that are -100 outside the answer and its end."""
    asked = [tokenizer(q)["input_ids"] for q, _ in pairs]
    said = [[*tokenizer(a)["input_ids"], tokenizer.eos_token_id] for _, a in pairs]
    width = max(len(q) + len(a) for q, a in zip(asked, said))
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    target = torch.full((len(pairs), width), -100)
    for row, (q, a) in enumerate(zip(asked, said)):
        ids[row, : len(q) + len(a)] = torch.tensor(q + a)
        target[row, len(q) : len(q) + len(a)] = torch.tensor(a)
    return ids, target
