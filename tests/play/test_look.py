"""A look into a model shows what is in it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from players import CONTEXT, make_player

from chargpt.config import AttentionType
from chargpt.corpus import sliding_windows
from chargpt.errors import ConfigError
from chargpt.play import look
from chargpt.run.evaluate import evaluate

TEXT = "a bad cafe, and more of it than the model can read at once."


@pytest.mark.parametrize("length", [1, 5, CONTEXT])
def test_what_is_read_is_the_last_row_of_the_weights(mha_type: AttentionType, length: int) -> None:
    player = make_player(mha_type.name)
    answer = look.attention(player, TEXT[:length])
    weights = player.run.attention_weights(TEXT[:length])
    assert (weights is not None, answer["bias"] is not None) == look.offers(player)
    if weights is None:
        assert answer["weights"] is None
        return
    np.testing.assert_allclose(answer["weights"], weights[:, :, -1], atol=1e-4)
    assert json.dumps(answer, allow_nan=False)


def test_beyond_a_window_nothing_is_read_and_nothing_is_added() -> None:
    player = make_player("selective", "model.window=3")
    answer = look.attention(player, "abcdef")
    assert [value is None for value in answer["bias"][0][0]] == [True] * 3 + [False] * 3
    assert answer["weights"][0][0][:3] == [0, 0, 0]


def test_surprise_is_that_of_chargpt_evaluate(mha_type: AttentionType) -> None:
    player = make_player(mha_type.name)
    found = look.surprise(player, TEXT)
    windows = sliding_windows(player.run.encode(TEXT), CONTEXT, CONTEXT // 2)
    scores = evaluate(player.run.model, windows, 8, None)
    assert found["nats"][0] is None and len(found["nats"]) == len(TEXT)
    np.testing.assert_allclose(sum(found["nats"][1:]), found["sum"], atol=0.01)
    np.testing.assert_allclose(found["mean"], scores["val/loss"], rtol=1e-4)
    tokens = jnp.asarray(player.run.encode(TEXT[:4]))
    told = jax.nn.log_softmax(player.run.model(tokens))[2]
    np.testing.assert_allclose(found["nats"][3], -told[tokens[3]], atol=1e-3)


@pytest.mark.parametrize(
    ("ask", "text", "message"),
    [
        (look.attention, "", "text: has 0 characters; standard reads 1 to 16"),
        (look.attention, "a" * 17, "text: has 17 characters; standard reads 1 to 16"),
        (look.attention, "a?", "not in the vocabulary: '?'"),
        (look.surprise, "a", "has one character; write two or more"),
        (look.surprise, "a?", "not in the vocabulary: '?'"),
    ],
)
def test_a_text_that_does_not_fit_is_refused(ask, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ask(make_player("standard"), text)
    assert message in str(error.value)
