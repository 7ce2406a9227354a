"""`reparameterize`: the affine parts of a traced function, merged into as few convolutions as they need."""
