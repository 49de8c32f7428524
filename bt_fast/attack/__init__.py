"""The ragged attack: every sample takes its own number of steps, and compute is spent on no other."""
