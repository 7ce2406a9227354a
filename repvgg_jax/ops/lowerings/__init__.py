"""The ways to compute one convolution: each a forward pass and two gradients, for the windows it supports."""
