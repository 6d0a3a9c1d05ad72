import numpy as np
import pytest

from prom_jax.data.shared_prefixes import NONE, SHORTEST, Beginnings, common_prompt, prompt_length
from prom_jax.data.tokens import Side


def side(tokens, prompt):
    """A text whose tokens after the prompt bear loss."""
    loss = np.arange(len(tokens)) >= prompt
    return Side(np.array(tokens, np.int32), loss, eos=0, bytes=0, words=1, truncated=False)


A, B = list(range(100, 130)), list(range(200, 220))


def test_kinds_and_what_they_begin_with():
    beginnings = Beginnings()
    kinds = [
        beginnings.add(text)
        for text in (
            side([*A, 1, 2, 3], 32),
            side([*B, 1, 2, 3], 22),
            side([*A[:25], 4, 5, 6, 7], 28),
            side([*B, 1, 2, 4], 22),
            side(B[: SHORTEST - 1], SHORTEST - 1),
            None,
        )
    ]
    assert kinds == [0, 1, 0, 1, NONE, NONE]
    # Of B the last prompt token is not shared, as it predicts what differs.
    assert beginnings.lengths().tolist() == [25, 21]


def test_shards_come_to_the_same_as_one():
    texts = [side([*prompt[: 17 + i % 4], i, i + 1, i + 2], 19) for i in range(12) for prompt in (A, B)]
    whole, merged = Beginnings(), Beginnings()
    kinds, numbers = [whole.add(text) for text in texts], {}
    for part in (range(1, 5), range(5, 24), range(1)):
        shard = Beginnings()
        own = np.array([shard.add(texts[i]) for i in part])
        numbers |= dict(zip(part, merged.merge(shard)[own].tolist()))
    same = {(kinds[i], numbers[i]) for i in range(24)}
    assert len(same) == 2 == len({kind for kind, _ in same}) == len({number for _, number in same})
    assert sorted(merged.lengths()) == sorted(whole.lengths())


@pytest.mark.parametrize(
    "english, expected", [(([*A[:20], 7, 8], 20), 19), (([*A[:9], 7, 8], 9), 8), (([7], 1), 0)]
)
def test_a_prompt_is_common_up_to_its_last_token(english, expected):
    assert common_prompt(side([*A[:20], 1, 2], 20), side(*english)) == expected


def test_a_text_without_loss_is_all_prompt():
    assert prompt_length(side(A, len(A))) == len(A)
    assert prompt_length(side(A, 0)) == 0
