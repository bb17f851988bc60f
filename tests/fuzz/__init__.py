"""Fuzzing of every reader of foreign bytes: `python -m tests.fuzz --inputs N --reader R`."""
