"""The benchmark: cells of solver x steps x grid x seed on one model, and their report."""
