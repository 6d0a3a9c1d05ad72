import numpy as np
import pytest

from prom_jax.data.shared_prefixes import NONE, SHORTEST, PrefixIndex, common_prompt, prompt_length
from prom_jax.data.tokens import EncodedText


def text(tokens, prompt):
    """A text whose tokens after the prompt have a loss."""
    loss = np.arange(len(tokens)) >= prompt
    return EncodedText(np.array(tokens, np.int32), loss, eos=0, bytes=0, words=1, truncated=False)


A, B = list(range(100, 130)), list(range(200, 220))


def test_ids_and_lengths_of_prefixes():
    index = PrefixIndex()
    ids = [
        index.add(each)
        for each in (
            text([*A, 1, 2, 3], 32),
            text([*B, 1, 2, 3], 22),
            text([*A[:25], 4, 5, 6, 7], 28),
            text([*B, 1, 2, 4], 22),
            text(B[: SHORTEST - 1], SHORTEST - 1),
            None,
        )
    ]
    assert ids == [0, 1, 0, 1, NONE, NONE]
    # Of B the last prompt token is not shared, as it predicts what differs.
    assert index.lengths().tolist() == [25, 21]


def test_shards_come_to_the_same_as_one():
    texts = [text([*prompt[: 17 + i % 4], i, i + 1, i + 2], 19) for i in range(12) for prompt in (A, B)]
    whole, merged = PrefixIndex(), PrefixIndex()
    ids, numbers = [whole.add(each) for each in texts], {}
    for part in (range(1, 5), range(5, 24), range(1)):
        shard = PrefixIndex()
        own = np.array([shard.add(texts[i]) for i in part])
        numbers |= dict(zip(part, merged.merge(shard)[own].tolist()))
    same = {(ids[i], numbers[i]) for i in range(24)}
    assert len(same) == 2 == len({one for one, _ in same}) == len({number for _, number in same})
    assert sorted(merged.lengths()) == sorted(whole.lengths())


@pytest.mark.parametrize(
    "english, expected", [(([*A[:20], 7, 8], 20), 19), (([*A[:9], 7, 8], 9), 8), (([7], 1), 0)]
)
def test_a_prompt_is_common_up_to_its_last_token(english, expected):
    assert common_prompt(text([*A[:20], 1, 2], 20), text(*english)) == expected


def test_a_text_without_loss_is_all_prompt():
    assert prompt_length(text(A, len(A))) == len(A)
    assert prompt_length(text(A, 0)) == 0
