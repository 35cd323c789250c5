"""What is written: one module for each kind of output, each of which takes a `Checkpoint`."""
