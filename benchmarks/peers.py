"""PROM's update as torch and transformers make it: two forwards through all blocks, and a pivot head.

Of prom_jax there are the tokens, the method's settings and what adapters begin with alone, and how it has the
C library keep memory.
"""

import copy
import os
import resource

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from prom_jax.checkpoints.adapter import NewAdapter
from prom_jax.models.auto import config_from_hf
from prom_jax.train import MOST_KEPT
from prom_jax.training import budget
from prom_jax.training.methods.prom import PROM
from prom_jax.training.setup import find_lora
from prom_jax.utils import command

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


def rows(texts: dict, layout, length: int, method: PROM) -> list[dict]:
    """The rows of an update: tokens and labels [R, T], stream, and the scale of the sum of their losses."""
    result = []
    for stream, some in texts.items():
        if not some:  # an update of translations alone has no English
            continue
        of_stream = list(layout(some, length))
        weight = method.weight if stream == "english" else 1.0
        scale = weight / sum((labels != IGNORED).sum() for _, labels in of_stream)
        for arrays in of_stream:
            tokens, labels = map(torch.from_numpy, arrays)
            result.append({"tokens": tokens, "labels": labels, "stream": stream, "scale": float(scale)})
    return result


def load(source: str, method: PROM, config):
    """transformers' model in float32, to train, with a `pivot_head` that starts as its head; its blocks are
    recomputed where `remat` is 'full'. With adapters, peft's are trained, which begin as ours, and the main
    head serves as pivot head, with an adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.pivot_head = copy.deepcopy(model.lm_head)  # which unties it
    if config.remat == "full":
        model.gradient_checkpointing_enable()
    if config.adapter.kind == "lora":
        add_adapters(model, method, config)
    return model.train()


def add_adapters(model, method: PROM, config):
    """Puts peft's adapters into transformers' model."""
    import peft

    base = config_from_hf(model.config.to_dict())
    lora = find_lora(config, base, method)
    ours = NewAdapter(base, lora, method.heads, config.seed)
    model.pivot_head.weight = model.lm_head.weight
    kind = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
    targets = sorted({name.split(".")[-3] for name in ours.tensors})
    peft.get_peft_model(model, peft.LoraConfig(**kind, target_modules=targets))
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            tensor = ("base_model.model." * name.startswith("model.")) + name.replace(".default", "")
            parameter.data.copy_(torch.from_numpy(ours.read(tensor, ())))
    model.enable_input_require_grads()  # or recomputed blocks would have no gradients


def row_loss(model, blocks, row: dict, method: PROM):
    """A row's part of the update's loss. Causal attention needs no mask of padding on the right."""
    tokens, labels = (row[name].to(model.device) for name in ("tokens", "labels"))
    english = row["stream"] == "english"
    outputs = blocks(tokens, output_hidden_states=english, use_cache=False)
    if english:
        hidden = outputs.hidden_states[method.layer]
        logits = model.pivot_head(model.model.norm(hidden) if method.norm == "final" else hidden)
    else:
        logits = model.lm_head(outputs.last_hidden_state)
    return row["scale"] * cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=method.label_smoothing if english else 0.0,
    )


class Peer:
    """A model in torch that takes one optimizer step on the examples of an update.

    Args:
      source: Hugging Face directory or hub id.
      layout: a key of LAYOUTS.
      method: whose loss is minimised.
      config: of the run; its dtype, remat and optimizer are the peer's too.
      compiled: whether torch compiles the model.
    """

    def __init__(self, source: str, layout: str, method: PROM, config, compiled: bool):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        command.keep_freed_memory()  # as our side does
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layout, self.method, self.config = LAYOUTS[layout], method, config
        self.model = load(source, method, config).to(self.device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        state = 16 * sum(parameter.numel() for parameter in self.parameters)  # with gradients and two moments
        if state > MOST_KEPT * budget.available_bytes():
            command.return_freed_memory()
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=(0.9, 0.999), weight_decay=config.optimizer.weight_decay, fused=True
        )
        self.blocks = torch.compile(self.model.model, dynamic=True) if compiled else self.model.model

    def step(self, texts: dict, learning_rate: float) -> tuple[float, int]:
        """One update on texts by stream ('target', 'english'); returns its loss and the slots it computed."""
        total, places = 0.0, 0
        for row in rows(texts, self.layout, self.config.data.seq_len, self.method):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"):
                loss = row_loss(self.model, self.blocks, row, self.method)
            loss.backward()
            total, places = total + loss.detach(), places + row["tokens"].numel()
        if self.config.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total), places

    def peak(self) -> int:
        """Bytes that were in use at most: of the GPU, or of this process on a CPU."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
