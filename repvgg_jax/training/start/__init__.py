"""The start of a training besides fresh variables: a whitened stem, blocks near the identity, or other weights."""
