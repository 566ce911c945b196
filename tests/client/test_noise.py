"""A client that clips its update and adds noise."""

import numpy as np
import pytest

from fedknow.client.noise import NoisyNode, clip, gaussian
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    EVALUATE,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)

SENT = Arrays(w=np.ones((2, 1), np.float32), n=np.array([3], np.int64))


class Trained:
    """A node whose update is (3, 0, 4), of norm 5."""

    update = (3.0, 0.0, 4)

    def handle(self, message, state):
        *w, n = self.update
        arrays = Arrays(
            w=SENT["w"] + np.array(w, np.float32).reshape(2, 1),
            n=SENT["n"] + np.int64(n),
        )
        content = {"arrays": arrays, "metrics": Metrics({"num-examples": 1})}
        return message.reply(content), {"count": state.get("count", 0) + 1}


def node(clip, noise=0.0, is_real=False, inner=None):
    config = read_config({"privacy": {"clip": clip, "noise": noise}})
    return NoisyNode(inner or Trained(), config, is_real)


def work(client=0, kind=TRAIN):
    content = {"arrays": SENT, "config": Config({"task": 0, "round": 1})}
    return Message(kind, node_of(client), "1", content=content)


def update(noisy, client=0, state=None):
    reply, _ = noisy.handle(work(client), state or {})
    assert reply.failure is None, reply.failure
    arrays = reply.arrays()
    return [*(arrays["w"] - SENT["w"]).ravel(), *(arrays["n"] - SENT["n"])]


def test_an_update_is_clipped_over_all_arrays():
    # 5 becomes 2.5: a half of (3, 0, 4).
    assert update(node(2.5)) == [1.5, 0.0, 2]
    assert update(node(5.0)) == [3.0, 0.0, 4]
    assert update(node(9.0)) == [3.0, 0.0, 4]
    assert clip(np.zeros(3), 1.0).tolist() == [0, 0, 0]


def test_noise_has_the_standard_deviation_that_is_said():
    draws = [update(node(2.5, 2.0), client)[:2] for client in range(2000)]
    mean, deviation = np.mean(draws, axis=0), np.std(draws, axis=0)
    np.testing.assert_allclose(mean, [1.5, 0.0], atol=4 * 5 / 2000**0.5)
    np.testing.assert_allclose(deviation, [5.0, 5.0], rtol=0.06)


def test_normal_numbers_are_normal():
    numbers = gaussian(b"secret", 200_000)
    assert abs(numbers.mean()) < 0.01
    assert numbers.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(numbers) < 1.96).mean() == pytest.approx(0.95, abs=0.003)
    assert np.isfinite(numbers).all()


def test_a_simulation_can_be_repeated_and_real_noise_cannot():
    assert update(node(1.0, 1.0)) == update(node(1.0, 1.0))
    assert update(node(1.0, 1.0)) != update(node(1.0, 1.0), client=1)
    real = [update(node(1.0, 1.0, is_real=True)) for _ in range(2)]
    assert real[0] != real[1]
    assert update(node(1.0, 1.0)) not in real


def test_work_done_again_has_the_same_noise_and_other_updates_another():
    noisy = node(1.0, 1.0, is_real=True)
    _, state = noisy.handle(work(), {})
    assert state["count"] == 1
    assert update(noisy, state=state) == update(noisy, state=state)
    inner = Trained()
    other = node(1.0, 1.0, is_real=True, inner=inner)
    before = update(other, state=state)
    inner.update = (6.0, 0.0, 8)
    # Clipped to the same, so that the noise alone differs.
    assert update(other, state=state) != before


def test_other_work_is_not_changed():
    noisy = node(1.0, 1.0)
    reply, _ = noisy.handle(work(kind=EVALUATE), {})
    assert reply.arrays()["w"].ravel().tolist() == [4.0, 1.0]


def test_an_update_that_is_not_finite_is_a_failure():
    inner = Trained()
    inner.update = (np.inf, 0.0, 0)
    reply, _ = node(1.0, 1.0, inner=inner).handle(work(), {})
    assert "not finite" in reply.failure.reason
