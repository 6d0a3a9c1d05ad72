"""PROM's update as torch and transformers make it: two forwards through all blocks, and a pivot head.

Of prom_jax there are the tokens alone.
"""

import copy
import os
import resource

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

IGNORED = -100  # a label that bears no loss
PADDED_ROWS = 4  # padded rows that are computed together: Alpaca's batch on a device


def packed(texts, length: int):
    """Texts end to end in rows of `length`, which see each other; the last row is as short as what is left.

    Args: texts: pairs of token ids and of whether each bears loss.
    Yields: token ids and labels, int64 [1, T] each.
    """
    tokens, labels = _joined(texts)
    for start in range(0, len(tokens), length):
        row = slice(start, start + length)
        yield tokens[None, row], _next(labels[None, row])


def padded(texts, length: int):
    """PADDED_ROWS texts at a time, on the right padded to the longest of them. As `packed`; [R, T] each."""
    for start in range(0, len(texts), PADDED_ROWS):
        some = texts[start : start + PADDED_ROWS]
        tokens = np.zeros((len(some), max(len(ids) for ids, _ in some)), np.int64)
        labels = np.full_like(tokens, IGNORED)
        for row, text in enumerate(some):
            ids, own = _joined([text])
            tokens[row, : len(ids)], labels[row, : len(ids)] = ids, own
        yield tokens, _next(labels)


LAYOUTS = {"published": packed, "padded": padded}


def _joined(texts):
    tokens = np.concatenate([ids for ids, _ in texts]).astype(np.int64)
    return tokens, np.where(np.concatenate([loss for _, loss in texts]), tokens, IGNORED)


def _next(labels):
    return np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)


class Peer:
    """A model in torch that takes one optimizer step on the examples of an update.

    Args:
      source: Hugging Face directory or hub id.
      layout: a key of LAYOUTS.
      objective, pivot_layer: as in `prom_jax.objective`; the method is 'prom'.
      config: of the run; its dtype, remat and optimizer are the peer's too.
      compiled: whether torch compiles the model.
    """

    def __init__(self, source: str, layout: str, objective, pivot_layer: int, config, compiled: bool):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layout, self.objective, self.pivot_layer, self.config = (
            LAYOUTS[layout],
            objective,
            pivot_layer,
            config,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = model.to(self.device).train()
        self.pivot_head = copy.deepcopy(self.model.lm_head)  # which unties it
        if config.remat == "full":
            self.model.gradient_checkpointing_enable()
        self.parameters = [*self.model.parameters(), *self.pivot_head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=(0.9, 0.999), weight_decay=config.optimizer.weight_decay, fused=True
        )
        self.blocks = torch.compile(self.model.model, dynamic=True) if compiled else self.model.model

    def step(self, texts: dict, learning_rate: float) -> tuple[float, int]:
        """One update on texts by role ('target', 'english'); returns its loss and the places it computed."""
        total, places = 0.0, 0
        for role, some in texts.items():
            rows = list(self.layout(some, self.config.data.seq_len))
            weight = sum((labels != IGNORED).sum() for _, labels in rows)
            scale = (self.objective.weight if role == "english" else 1.0) / weight
            for tokens, labels in rows:
                loss = scale * self._loss(
                    role, *(torch.from_numpy(x).to(self.device) for x in (tokens, labels))
                )
                loss.backward()
                total, places = total + loss.detach(), places + tokens.size
        if self.config.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total), places

    def _loss(self, role: str, tokens, labels):
        """Sum of the rows' token losses. Causal attention needs no mask of padding on the right."""
        english = role == "english"
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"):
            outputs = self.blocks(tokens, output_hidden_states=english, use_cache=False)
            if english:
                logits = self.pivot_head(outputs.hidden_states[self.pivot_layer])
            else:
                logits = self.model.lm_head(outputs.last_hidden_state)
        smoothing = self.objective.label_smoothing if english else 0.0
        return cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=smoothing,
        )

    def peak(self) -> int:
        """Bytes that were in use at most: of the GPU, or of this process on a CPU."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
