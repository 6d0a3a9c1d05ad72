"""The model card of an export, as the hub reads it."""

from huggingface_hub import ModelCard

from prom_jax.checkpoints.model_card import TAG, license_of, model_card, public

CARD = {
    "base_model": "owner/base@v1",
    "language": "sw",
    "method": "prom",
    "license": "apache-2.0",
    "data": ["/home/me/private/sw.jsonl", "owner/alpaca", "mine/en.jsonl?instruction=q"],
    "results": {"target_bits_per_byte": (3.317, 2.9191)},
    "steps": 12,
}


def test_a_card_has_what_the_hub_asks_for(tmp_path):
    text = model_card(public(CARD), "swahili")
    (tmp_path / "README.md").write_text(text)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "owner/base"
    assert (card.data.language, card.data.license, card.data.tags) == ("sw", "apache-2.0", [TAG])
    assert (card.data.datasets, card.data.library_name) == (["owner/alpaca"], "transformers")
    assert f"- {TAG}" in text.splitlines()  # by which a folder is known as an export
    assert 'AutoModelForCausalLM.from_pretrained("swahili")' in card.text
    assert "| target bits per byte | 3.317 | 2.919 |" in card.text
    assert "- `sw.jsonl`\n- `owner/alpaca`\n- `en.jsonl`" in card.text
    assert "| steps | 12 |" in card.text and "/home/me" not in text
    assert license_of(tmp_path / "README.md") == "apache-2.0"


def test_a_card_without_training_says_little(tmp_path):
    text = model_card({"base_model": "base"}, "copy")
    assert "converted by prom_jax" in text and "held-out" not in text and "## Data" not in text
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(tmp_path / "README.md") is None
    assert license_of(tmp_path / "none.md") is None
