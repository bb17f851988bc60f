"""How well policies act, with figures that can be trusted: `python -m benchmarks.quality small|full|paradigms|moe`."""
