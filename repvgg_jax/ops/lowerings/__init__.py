"""The lowerings: each is one way to compute a convolution, as a forward pass and two gradients, for some windows."""
