"""The ragged attack: every sample takes its own number of steps, and no compute is spent on finished samples."""
