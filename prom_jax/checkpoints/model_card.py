"""The model card of an export."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAG = "prom_jax"  # marks a folder as an export, which the next may replace
ADAPTED = "A language model adapted to another language by instruction tuning with prom_jax."
CONVERTED = "A language model converted by prom_jax."
# Rows that are shown apart from the settings.
_LICENSE, _DATA, _RESULTS = "license", "data", "results"
_USAGE = """## Usage

Prompts follow the chat template of the tokenizer; a system message stands in place of its first sentence.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
messages = [{{"role": "user", "content": "…"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""

_ADAPTER_USAGE = (
    _USAGE.replace("AutoModelForCausalLM, AutoTokenizer", "AutoTokenizer")
    .replace("from transformers", "from peft import AutoPeftModelForCausalLM\nfrom transformers")
    .replace("model = AutoModel", "model = AutoPeftModel")
)


def public(card: Mapping[str, Any]) -> dict:
    """A model card's rows, without paths of this machine, which say nothing to others.

    Args:
      card: the rows.

    Returns:
      The same, with the last name of a path in place of it.
    """
    base = str(card.get("base_model", ""))
    named = {"base_model": Path(base).name} if base and Path(base).exists() else {}
    data = {_DATA: [_source_name(str(source)) for source in card[_DATA]]} if _DATA in card else {}
    return {**card, **named, **data}


def model_card(card: Mapping[str, Any], name: str, adapter: bool = False) -> str:
    """A model card, whose tag marks its folder as an export.

    Args:
      card: its rows. 'base_model', where it is a hub id, 'language', 'license' of the base model and 'data',
        the sources, also go to the hub's metadata; 'results' are {measure: [before, after]} on held-out data.
      name: of the model, for the snippet that loads it.
      adapter: whether it is an adapter of PEFT's and no whole model.

    Returns:
      The content of a `README.md`.
    """
    base, data = str(card.get("base_model", "")).partition("@")[0], card.get(_DATA, [])
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[TAG],
        base_model=base if "/" in base else None,
        language=_one_or_list(str(card.get("language", "")).split(",")),
        license=str(card.get(_LICENSE, "")) or None,
        datasets=[source for source in data if re.fullmatch(r"[\w.-]+/[\w.-]+", source)] or None,
    )
    rows = {key: value for key, value in card.items() if key not in (_LICENSE, _DATA, _RESULTS)}
    parts = [
        ADAPTED if "method" in card else CONVERTED,
        (_ADAPTER_USAGE if adapter else _USAGE).format(name=name),
        _results(card.get(_RESULTS, {})),
        "## Data\n\n" + "\n".join(f"- `{source}`" for source in data) if data else "",
        _table("Settings", ("", ""), rows.items()),
        f"## Licence\n\nThat of the base model: {card[_LICENSE]}." if _LICENSE in card else "",
    ]
    body = "\n\n".join(filter(None, parts))
    return str(ModelCard(f"---\n{metadata}\n---\n\n# {name}\n\n{body}\n"))


def _one_or_list(codes: list[str]) -> str | list[str] | None:
    """As metadata has languages: one as a text, several as a list."""
    return codes if len(codes) > 1 else codes[0] or None


def _results(results: Mapping[str, tuple[float, float]]) -> str:
    if not results:
        return ""
    rows = [
        (name.replace("_", " "), f"{before:.3f}", f"{after:.3f}") for name, (before, after) in results.items()
    ]
    return _table("Before and after, on held-out data", ("", "before", "after"), rows)


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple]) -> str:
    cells = [columns, ("---",) * len(columns), *rows]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def license_of(readme: Path) -> str | None:
    """The licence that the metadata of a model card names; None where it names none."""
    try:
        return ModelCard.load(readme).data.license if readme.is_file() else None
    except Exception:  # of strangers, of any form; it is of no use then
        return None


def _source_name(source: str) -> str:
    """A data source without the folders of this machine, and without what follows its name."""
    path = source.partition("?")[0]
    on_disk = path.startswith(("/", ".", "~")) or Path(path).exists() or Path(path).suffix
    return Path(path).name if on_disk else path
