"""What each value of a traced program is: a constant, affine in an earlier value, or something else."""
