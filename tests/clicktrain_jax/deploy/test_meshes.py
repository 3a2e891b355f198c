"""Nets whose images lie on several devices: in a process of its own, as devices are counted once."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = r"""
    import functools
    import re
    import jax, jax.numpy as jnp, numpy as np
    import clicktrain_jax as ct
    import pallas_kernels as pk
    from clicktrain_jax.deploy.load import inference_net
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from pallas_kernels import native

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 3, 8, 8)).astype(np.float32) / 8 for name in ("dense", "pruned")}
    masks = {"dense": None, "pruned": rng.random((3, 3, 8, 8)) < 0.3}
    x = rng.normal(size=(8, 16, 16, 8)).astype(np.float32)

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

    def check(kind, images, weights, share, backends=(None,)):
        # Right values, and in each native call as many images as `share` says.
        on_x, on_p = jax.device_put(x, NamedSharding(mesh[kind], images)), jax.device_put(params, NamedSharding(
            mesh[kind], weights))
        for backend in backends:
            fast = ct.accelerate(net, masks, backend=backend)
            value = jax.jit(fast).lower(on_p, on_x).compile()
            pulled = jax.jit(jax.grad(functools.partial(loss, fast))).lower(on_p, on_x).compile()
            close(value(on_p, on_x), wanted)
            jax.tree.map(close, pulled(on_p, on_x), gradient)
            if backend is None:
                check_shares(value, 2, share)
                check_shares(pulled, 3, share)

    def check_shares(compiled, count, share):
        found = re.findall(r"= f32.(\d+),16,16,8\S* custom-call.*target=.clicktrain_conv", compiled.as_text())
        assert [int(images) for images in found] == [share] * count * is_native, (found, share)

    devices, is_native = jax.device_count(), native.is_fast()
    batch, size = len(x), len(x) // devices
    mesh = {kind: jax.make_mesh((devices,), ("d",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit)}
    check(AxisType.Explicit, P("d"), P(), size, (None, "xla", "reference"))
    check(AxisType.Auto, P("d"), P(), size, (None, "xla", "reference"))
    for images, weights in ((P(), P(None, None, None, "d")), (P(None, "d"), P(None, None, "d"))):
        check(AxisType.Auto, images, weights, batch)
    auto = mesh[AxisType.Auto]
    fast = ct.accelerate(net, masks)
    for check_vma in (True, False):
        shares = jax.shard_map(fast, mesh=auto, in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check_vma)
        close(jax.jit(shares)(params, x), wanted)
    # What a native call gives is known to vary, so that its gradient is summed over the devices, once.
    pulled = jax.shard_map(jax.grad(lambda params, x: jax.lax.psum(loss(fast, params, x), "d")), mesh=auto,
                           in_specs=(P(), P("d")), out_specs=P())
    jax.tree.map(close, jax.jit(pulled)(params, x), gradient)
    loaded = inference_net(net, zeroed, masks, image_shape=x.shape[1:], normalise=None)
    function, prepared = loaded.program(batch)
    structure = pk.make_structure(masks["pruned"])
    def alone(kernel, x):
        return pk.pattern_conv(x, kernel, structure)
    for each in mesh.values():
        on_x, kernel = (jax.device_put(array, NamedSharding(each, spec))
                        for array, spec in ((x, P("d")), (params["pruned"], P())))
        result = loaded(on_x)
        close(result, wanted)
        assert result.sharding.spec[0] == "d" or not is_native
        check_shares(function.lower(prepared, on_x).compile(), 2, size)
        check_shares(jax.jit(alone).lower(kernel, on_x).compile(), 1, size)
        close(jax.jit(jax.vmap(lambda image: alone(kernel, image[None])[0]))(on_x), alone(params["pruned"], x))
    # A share that cannot be whole: all images on each device, none summed twice.
    def uneven(params, x):
        return ct.accelerate(net, masks)(params, jax.lax.with_sharding_constraint(x, NamedSharding(auto, P("d"))))
    odd = jax.device_put(x[:batch - 1], NamedSharding(auto, P()))
    pulled = jax.jit(jax.grad(functools.partial(loss, uneven)))(jax.device_put(params, NamedSharding(auto, P())), odd)
    part = jax.grad(functools.partial(loss, net))(zeroed, x[:batch - 1])
    jax.tree.map(close, pulled, part | {"pruned": part["pruned"] * masks["pruned"]})
    # Two axes, of which the images lie on both, on one, or on one by hand.
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh[kind] = square = jax.make_mesh((devices // 2, 2), ("a", "d"), axis_types=(kind,) * 2)
        check(kind, P(("a", "d")), P(), size)
        check(kind, P("d"), P(), batch // 2)
        with jax.set_mesh(square):
            by_hand = jax.shard_map(ct.accelerate(net, masks), mesh=square, in_specs=(P(), P("d")), out_specs=P("d"),
                                    check_vma=False, axis_names={"d"})
            places = NamedSharding(square, P()), NamedSharding(square, P("d"))
            close(jax.jit(by_hand)(*map(jax.device_put, (params, x), places)), wanted)
"""


@pytest.mark.parametrize(("devices", "native"), [(4, "1"), (2, "0")])
def test_images_and_parameters_on_several_devices(devices, native):
    flags = f"--xla_force_host_platform_device_count={devices}"
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
    loaded = inference_net(net, zeroed, masks, image_shape=x.shape[1:], normalise={{"mean": 0.0, "std": 1.0}})
    close(loaded(jax.nn.sigmoid(x[:2])), net(zeroed, jax.nn.sigmoid(x[:2])))
    """)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
