"""A plain training loop, losses and answers, as in a textbook: the reference for the engine."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from stages.data.examples import Example
from stages.runtime.params import TrainParams


def textbook_steps(
    model: PreTrainedModel,
    batches: Sequence[Sequence[Example]],
    params: TrainParams,
    num_warmup_steps: int,
    pad_to: int | None = None,
) -> Iterator[float]:
    """Train the model in place, one effective batch per step; yields the loss of each step, in nats/token.

    Micro-batches of `batch_size` examples in order, padded on the right, with all logits; gradients are accumulated.

    Args:
        pad_to: tokens; None pads to the longest example of a micro-batch.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.ndim == 1]  # biases and norms
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate)
    for step, batch in enumerate(batches, 1):
        num_tokens = sum(int((example.labels != -100).sum()) for example in batch)
        total = 0.0
        for start in range(0, len(batch), params.batch_size):
            rows = batch[start : start + params.batch_size]
            width = pad_to or max(len(example.input_ids) for example in rows)
            ids, labels, mask = torch.zeros(3, len(rows), width, dtype=torch.long, device=model.device)
            labels[:] = -100
            for row, example in enumerate(rows):
                length = len(example.input_ids)
                ids[row, :length] = torch.tensor(example.input_ids)
                labels[row, :length] = torch.tensor(example.labels)
                mask[row, :length] = 1
            with torch.autocast(model.device.type, torch.bfloat16, enabled=params.precision == "bf16"):
                logits = model(input_ids=ids, attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / num_tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * schedule(params.lr_scheduler, step, num_warmup_steps, len(batches))
        optimizer.step()
        optimizer.zero_grad()
        yield total / num_tokens


def textbook_losses(model: PreTrainedModel, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The losses of each example: one at a time, all logits, plain cross entropy with `ignore_index` -100."""
    losses = {}
    for example in examples:
        ids = torch.tensor(example.input_ids[None].astype(int), device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        labels = torch.tensor(example.labels[1:].astype(int), device=model.device)
        all_losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        losses[example.example_id] = all_losses[labels != -100]
    return losses


def textbook_answer(model: Any, prompt: list[int], eos_token_id: int | None, max_new_tokens: int = 12) -> list[int]:
    """The new token ids that `generate` of transformers returns for one prompt, with greedy decoding."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": eos_token_id, "pad_token_id": 0}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    new_ids: list[int] = output[0, len(prompt) :].tolist()
    return new_ids


def schedule(kind: str, step: int, num_warmup_steps: int, num_steps: int) -> float:
    """Learning rate ÷ its peak at a step, counted from 1: the peak at the end of the warmup, 0 after the last step."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    peak = max(num_warmup_steps, 1)
    progress = (step - peak) / (num_steps + 1 - peak)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]
