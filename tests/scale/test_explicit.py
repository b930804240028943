"""Meshes whose axes are part of types, as `jax.make_mesh` makes them: gradients are those of one device."""

from tests.devices import on_eight


def test_values_and_gradients_are_those_of_one_device():
    found = on_eight("tests.scale.explicit", key="case")
    assert len(found) == 16
    assert all(report["off"] < 3e-6 and report["lies"] for report in found.values()), found
