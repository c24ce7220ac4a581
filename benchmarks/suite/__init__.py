"""What the benchmarks share: shapes, systems under test, interleaved timing, and records of what was seen."""
