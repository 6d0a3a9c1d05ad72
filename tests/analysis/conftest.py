"""Small tables, and a tokenizer that falls back to bytes."""

import functools
import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.analysis.reference import write_table


@pytest.fixture
def tables(tmp_path):
    """`write_table` into a folder of the test."""
    return functools.partial(write_table, tmp_path / "tables")


@pytest.fixture(scope="session")
def byte_fallback(metaspace):
    """`metaspace` with a token for each byte in place of unknown ones, as LLaMA-2's."""
    state = json.loads(metaspace.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
