"""Many runs: compared, inspected, swept over, searched with."""
