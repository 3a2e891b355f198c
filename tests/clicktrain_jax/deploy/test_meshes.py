"""`accelerate` where images lie on two devices: in a process of its own, as devices are counted once."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import functools
    import jax, jax.numpy as jnp, numpy as np
    import clicktrain_jax as ct
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 3, 8, 8)).astype(np.float32) / 8 for name in ("dense", "pruned")}
    masks = {"dense": None, "pruned": rng.random((3, 3, 8, 8)) < 0.3}
    x = rng.normal(size=(4, 16, 16, 8)).astype(np.float32)

    def net(params, x):
        for kernel in (params["dense"], params["pruned"]):
            x = jnp.tanh(jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return x.mean((1, 2))

    def loss(net, params, x):
        return jnp.sum(jnp.sin(net(params, x)))

    zeroed = params | {"pruned": params["pruned"] * masks["pruned"]}
    wanted, gradient = net(zeroed, x), jax.grad(functools.partial(loss, net))(zeroed, x)
    gradient = gradient | {"pruned": gradient["pruned"] * masks["pruned"]}
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)

    def check(kind, images, weights):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
        on_x = jax.device_put(x, NamedSharding(mesh, images))
        on_p = jax.device_put(params, NamedSharding(mesh, weights))
        for backend in (None, "xla", "reference"):
            fast = ct.accelerate(net, masks, backend=backend)
            close(jax.jit(fast)(on_p, on_x), wanted)
            jax.tree.map(close, jax.jit(jax.grad(functools.partial(loss, fast)))(on_p, on_x), gradient)
        return mesh

    check(AxisType.Explicit, P("d"), P())
    for images, weights in ((P("d"), P()), (P(), P(None, None, None, "d")), (P(None, "d"), P(None, None, "d"))):
        mesh = check(AxisType.Auto, images, weights)
    shares = jax.shard_map(ct.accelerate(net, masks), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"),
                           check_vma=False)
    close(jax.jit(shares)(params, x), wanted)
"""


@pytest.mark.parametrize("native", ["1", "0"])
def test_images_and_parameters_on_two_devices(native):
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "CLICKTRAIN_NATIVE": native}
    subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], check=True, env=environment)


@pytest.mark.parametrize("option", ["jax_numpy_rank_promotion", "jax_debug_nans", "jax_disable_jit"])
def test_strict_modes(option):
    setting = {"jax_numpy_rank_promotion": "raise"}.get(option, True)
    head, _, _ = PROGRAM.partition("    def check(")
    program = textwrap.dedent(head) + textwrap.dedent(f"""
    jax.config.update({option!r}, {setting!r})
    for backend in (None, "xla", "reference"):
        fast = ct.accelerate(net, masks, backend=backend)
        close(fast(params, x[:1]), wanted[:1])
        jax.grad(functools.partial(loss, fast))(params, x[:1])
    from clicktrain_jax.deploy.load import inference_net
    loaded = inference_net(net, zeroed, masks, image_shape=x.shape[1:], normalise={{"mean": 0.0, "std": 1.0}})
    close(loaded(jax.nn.sigmoid(x[:2])), net(zeroed, jax.nn.sigmoid(x[:2])))
    """)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
