"""What an export takes, told from shapes and from the speed of a machine: no model is read and nothing is run."""
