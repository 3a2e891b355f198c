"""The training loop: the host side, the device side, and what a run is made of."""
