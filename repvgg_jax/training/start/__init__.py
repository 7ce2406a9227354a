"""What training begins with besides fresh variables: a stem made white, blocks near the identity, other weights."""
