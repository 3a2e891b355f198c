"""Parameters that a call holds in several places: the copy that convolutions read is the masks', or none is guessed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(2):
            x = nn.relu(nn.Conv(16, (3, 3), name=f"Conv_{index}")(x))
        return nn.Dense(5)(x.mean((1, 2)))


MODEL = Net()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
STUDENT, TEACHER = (jax.jit(MODEL.init)(jax.random.key(seed), X)["params"] for seed in (1, 2))
KEEP = RNG.random((3, 3, 16, 16)) < 0.3
MASKS = jax.tree.map(lambda _: None, STUDENT)
MASKS["Conv_1"]["kernel"] = KEEP


def pruned(params):
    return params | {"Conv_1": params["Conv_1"] | {"kernel": jnp.where(KEEP, params["Conv_1"]["kernel"], 0)}}


def apply(params, x):
    return MODEL.apply({"params": params}, x)


def both(student, teacher, x):
    return apply(student, x), apply(teacher, x)


def close(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_two_copies_that_are_read_are_refused_and_can_be_named():
    fast = ct.accelerate(both, MASKS)
    with pytest.raises(ValueError, match=r"'Conv_1/kernel' from several places, '0', '1'.*at='0'"):
        fast(STUDENT, TEACHER, X)
    with pytest.raises(ValueError, match="several places"):
        jax.jit(fast)(STUDENT, TEACHER, X)
    close(ct.accelerate(both, MASKS, at="0")(STUDENT, TEACHER, X), both(pruned(STUDENT), TEACHER, X))
    close(ct.accelerate(both, MASKS, at="1")(STUDENT, TEACHER, X), both(STUDENT, pruned(TEACHER), X))
    all_of_them = ct.accelerate(both, MASKS, at=("0", "1"))
    close(all_of_them(STUDENT, TEACHER, X), both(pruned(STUDENT), pruned(TEACHER), X))
    with pytest.raises(ValueError, match="at='2': no parameter of the masks is found there; found at '0', '1'"):
        ct.accelerate(both, MASKS, at="2")(STUDENT, TEACHER, X)
    # A choice keeps to it.
    dense = ct.accelerate(both, MASKS, at="0").with_choice({"Conv_1/kernel": "dense"})
    close(dense(STUDENT, TEACHER, X), both(pruned(STUDENT), TEACHER, X))


@pytest.mark.parametrize("name", ["ema", "zema", "a"])
@pytest.mark.parametrize("read", ["params", "copy"])
def test_the_copy_that_is_read_is_taken(name, read):
    state = {"params": STUDENT, name: TEACHER}
    key = name if read == "copy" else "params"
    got = ct.accelerate(lambda state, x: apply(state[key], x), MASKS)(state, X)
    close(got, apply(pruned(state[key]), X))


def test_a_copy_that_is_only_averaged_stays_as_it_is():
    def step(params, ema, x):
        return apply(params, x), jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, ema, params)

    logits, ema = jax.jit(ct.accelerate(step, MASKS))(STUDENT, TEACHER, X)
    close((logits, ema), step(pruned(STUDENT), TEACHER, X))


def test_a_copy_inside_of_a_loop_counts_too():
    def net(params, ema, x):
        y = apply(params, x)
        return jax.lax.scan(lambda total, _: (total + apply(ema, x), None), y, length=2)[0]

    with pytest.raises(ValueError, match="several places, '0', '1'"):
        ct.accelerate(net, MASKS)(STUDENT, TEACHER, X)


def test_keywords_and_lists_and_parts_in_several_arguments():
    close(ct.accelerate(lambda *, x, params: apply(params, x), MASKS)(x=X, params=STUDENT), apply(pruned(STUDENT), X))
    copies = ct.accelerate(lambda copies, x: apply(copies[1], x), MASKS)
    close(copies([STUDENT, TEACHER], X), apply(pruned(TEACHER), X))
    first, rest = {"Conv_0": STUDENT["Conv_0"]}, {name: STUDENT[name] for name in ("Conv_1", "Dense_0")}
    masks = jax.tree.map(lambda leaf: leaf, MASKS, is_leaf=lambda leaf: leaf is None)
    masks["Conv_0"]["kernel"] = np.arange(3 * 3 * 3 * 16).reshape(3, 3, 3, 16) % 2 > 0
    fast = ct.accelerate(lambda first, rest, x: apply({**first, **rest}, x), masks)
    wanted = pruned(STUDENT)
    wanted["Conv_0"] = wanted["Conv_0"] | {"kernel": wanted["Conv_0"]["kernel"] * masks["Conv_0"]["kernel"]}
    close(fast(first, rest, X), apply(wanted, X))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="Conv_1")(x))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Conv(16, (3, 3), name="Conv_1")(x)

        return Block(name="Block")(x)


def test_a_block_with_the_same_names_is_no_copy():
    model, x = Nested(), RNG.normal(size=(2, 8, 8, 16)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    masks = jax.tree.map(lambda _: None, params)
    masks["Conv_1"]["kernel"] = KEEP
    wanted = params | {"Conv_1": params["Conv_1"] | {"kernel": params["Conv_1"]["kernel"] * KEEP}}
    call = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
    close(ct.accelerate(call, masks)(params, x), call(wanted, x))
    # Masks of one layer alone may be of either.
    with pytest.raises(ValueError, match="'0', '0/Block'"):
        ct.accelerate(call, {"Conv_1": {"kernel": KEEP}})(params, x)
    inner = ct.accelerate(call, {"Conv_1": {"kernel": KEEP}}, at="0/Block")
    block = {"Conv_1": params["Block"]["Conv_1"] | {"kernel": params["Block"]["Conv_1"]["kernel"] * KEEP}}
    close(inner(params, x), call(params | {"Block": block}, x))
